"""Llama: rotary attention with grouped heads, RMSNorm, SwiGLU (https://arxiv.org/abs/2302.13971)."""

from typing import Any

from flame.models.family import Family, attention_flops


def _flops(config: Any, seq_len: int) -> float:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return attention_flops(config.num_hidden_layers, config.num_attention_heads * head_dim, seq_len)


LLAMA = Family(
    model_types=("llama",),
    blocks="layers",
    embedding="embed_tokens",
    norm="norm",
    mixer_flops=_flops,
    packing="positions",
)
