"""Falcon: attention beside the MLP, one or a few key-value heads, rotary positions (https://arxiv.org/abs/2311.16867)."""

from flame.models.family import Family
from flame.models.llama import rotary_attention_flops

FALCON = Family(
    model_types=("falcon",),
    blocks="h",
    embedding="word_embeddings",
    norm="ln_f",
    mixer_flops=rotary_attention_flops,
    packing="mask",  # transformers' Falcon builds its own from the length alone, whatever the positions say
)
