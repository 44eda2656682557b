"""Falcon: attention beside the MLP, one or a few key-value heads, rotary positions (https://arxiv.org/abs/2311.16867)."""

from typing import Any

import torch

from flame.models.family import Family, TPPlan
from flame.models.llama import rotary_attention_flops


def _own_heads(config: Any, parameter: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """The rank's queries with the one key and the one value that all heads share; or its groups of heads."""
    if config.new_decoder_architecture or not config.multi_query:
        return parameter.chunk(ranks)[rank]
    both = 2 * config.head_dim
    queries, shared = parameter.split([len(parameter) - both, both])
    return torch.cat([queries.chunk(ranks)[rank], shared])


FALCON = Family(
    model_types=("falcon",),
    blocks="h",
    embedding="word_embeddings",
    norm="ln_f",
    mixer_flops=rotary_attention_flops,
    packing="mask",  # transformers' Falcon builds its own from the length alone, whatever the positions say
    tp_plan=TPPlan(
        token_mixers=("self_attention",),
        mlps=("mlp",),
        shard_dims={"self_attention.dense.weight": 1, "mlp.dense_h_to_4h.*": 0, "mlp.dense_4h_to_h.weight": 1},
        slicers={"self_attention.query_key_value.*": _own_heads},
        must_divide=("num_attention_heads", "num_kv_heads"),  # which is the former where all heads share one
        head_count_attrs=("num_heads", "num_kv_heads"),
        requires={"alibi": False},
    ),
    float8="its blocks add in place to what torchao's linear layers return",
)
