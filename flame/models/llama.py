"""Llama and what is built like it: rotary attention with grouped heads, RMSNorm, SwiGLU
(https://arxiv.org/abs/2302.13971), Mistral's window (https://arxiv.org/abs/2310.06825), the norms of Qwen3, OLMo 2.
"""

from dataclasses import replace
from typing import Any

from flame.models.family import Cut, Family, attention_flops


def rotary_attention_flops(config: Any, seq_len: int) -> float:
    """Forward FLOPs a token of all attention layers of a config with transformers' names."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)  # where layers differ, each says whether the window is its own
    if layers is None:
        layers = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    windows = [window if kind == "sliding_attention" else None for kind in layers]
    return sum(attention_flops(width, seq_len, window) for window in windows)


LLAMA = Family(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    blocks="layers",
    embedding="embed_tokens",
    norm="norm",
    mixer_flops=rotary_attention_flops,
    packing="positions",
    cut=Cut(
        mixers=("self_attn",),
        columns=("mlp",),
        split={
            **{f"self_attn.{name}_proj.*": 0 for name in "qkv"},
            "self_attn.o_proj.weight": 1,
            **{f"mlp.{name}_proj.*": 0 for name in ("gate", "up")},
            "mlp.down_proj.weight": 1,
        },
        divides=("num_attention_heads", "num_key_value_heads", "intermediate_size"),
    ),
)

OLMO2 = replace(LLAMA, model_types=("olmo2",), cut="its norms of queries and keys span all heads")
