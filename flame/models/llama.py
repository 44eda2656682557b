"""Llama and what is built like it: rotary attention with grouped heads, RMSNorm, SwiGLU
(https://arxiv.org/abs/2302.13971), Mistral's window (https://arxiv.org/abs/2310.06825), the norms of Qwen3, OLMo 2.
"""

from dataclasses import replace
from typing import Any

from flame.models.family import Family, TPPlan, attention_flops, each_layer


def rotary_attention_flops(config: Any, seq_len: int) -> float:
    """Forward FLOPs a token of all attention layers of a config with transformers' names."""
    # where layers differ, each says whether the window is its own
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return sum(
        _layer_flops(layer, seq_len, kind == "sliding_attention")
        for layer, kind in zip(each_layer(config), kinds, strict=False)
    )


def _layer_flops(layer: Any, seq_len: int, slides: bool) -> float:
    head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    window = getattr(layer, "sliding_window", None) if slides else None
    return attention_flops(layer.num_attention_heads * head_dim, seq_len, window)


LLAMA = Family(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    blocks="layers",
    embedding="embed_tokens",
    norm="norm",
    mixer_flops=rotary_attention_flops,
    packing="positions",
    tp_plan=TPPlan(
        token_mixers=("self_attn",),
        mlps=("mlp",),
        shard_dims={
            **{f"self_attn.{name}_proj.*": 0 for name in "qkv"},
            "self_attn.o_proj.weight": 1,
            **{f"mlp.{name}_proj.*": 0 for name in ("gate", "up")},
            "mlp.down_proj.weight": 1,
        },
        must_divide=("num_attention_heads", "num_key_value_heads", "intermediate_size"),
    ),
)

OLMO2 = replace(LLAMA, model_types=("olmo2",), tp_plan="its norms of queries and keys span all heads")
