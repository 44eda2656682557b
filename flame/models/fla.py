"""Model types of flash-linear-attention. Their kernels need a GPU; flame.models.reference serves them on a CPU."""

from typing import Any

from flame.models.family import Family, attention_flops


def _transformer_flops(config: Any, seq_len: int) -> float:
    window = config.window_size or seq_len
    return attention_flops(config.num_hidden_layers, config.hidden_size, min(seq_len, 2 * window))


def _gla_flops(config: Any, seq_len: int) -> float:
    # Per head and token the state (d_k x d_v) is decayed, written (k v^T) and read (q S): 2 FLOPs a MAC, two MACs an
    # entry. A hybrid's `attn` layers are softmax attention.
    attention = len(config.attn["layers"]) if config.attn else 0
    d_k, d_v = config.hidden_size * config.expand_k, config.hidden_size * config.expand_v
    state = (config.num_hidden_layers - attention) * 2 * 2 * d_k * d_v / config.num_heads
    return state + attention_flops(attention, config.hidden_size, seq_len)


FLA_TRANSFORMER = Family(
    model_types=("transformer",),
    blocks="layers",
    embedding="embeddings",
    norm="norm",
    mixer_flops=_transformer_flops,
    packing="cu_seqlens",
    from_fla=True,
)

GLA = Family(  # https://arxiv.org/abs/2312.06635
    model_types=("gla",),
    blocks="layers",
    embedding="embeddings",
    norm="norm",
    mixer_flops=_gla_flops,
    packing="cu_seqlens",
    from_fla=True,
)
