"""Model types of transformers with softmax attention: Llama and its kin, GPT-NeoX, Falcon, mixtures of experts."""

from dataclasses import replace
from typing import Any

import torch

from flame.models.family import Family, TPPlan, each_layer, head_dim
from flame.models.flops import attention_flops


def rotary_attention_flops(config: Any, seq_len: int) -> float:
    """Forward FLOPs per token of all attention layers of a config with transformers' names."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return sum(
        _layer_flops(layer, seq_len, kind == "sliding_attention")
        for layer, kind in zip(each_layer(config), kinds, strict=False)
    )


def _layer_flops(layer: Any, seq_len: int, slides: bool) -> float:
    window = getattr(layer, "sliding_window", None) if slides else None
    return attention_flops(layer.num_attention_heads * head_dim(layer), seq_len, window)


_ATTENTION = {**{f"self_attn.{name}_proj.*": 0 for name in "qkv"}, "self_attn.o_proj.weight": 1}
_DENSE_MLP = {"mlp.dense_h_to_4h.*": 0, "mlp.dense_4h_to_h.weight": 1}
_QK_NORMS = "its norms of queries and keys span all heads"

# https://arxiv.org/abs/2302.13971, Mistral's window: https://arxiv.org/abs/2310.06825
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
        shard_dims={**_ATTENTION, "mlp.gate_proj.*": 0, "mlp.up_proj.*": 0, "mlp.down_proj.weight": 1},
        must_divide=("num_attention_heads", "num_key_value_heads", "intermediate_size"),
    ),
)
OLMO2 = replace(LLAMA, model_types=("olmo2",), tp_plan=_QK_NORMS)

GPT_NEOX = Family(  # Pythia too; https://arxiv.org/abs/2204.06745
    model_types=("gpt_neox",),
    blocks="layers",
    embedding="embed_in",
    norm="final_layer_norm",
    mixer_flops=rotary_attention_flops,
    packing="positions",
    tp_plan=TPPlan(
        token_mixers=("attention",),
        mlps=("mlp",),
        # the rows of query_key_value are ordered by head
        shard_dims={"attention.query_key_value.*": 0, "attention.dense.weight": 1, **_DENSE_MLP},
        must_divide=("num_attention_heads", "intermediate_size"),
    ),
)


def _falcon_heads(config: Any, parameter: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """The rank's queries with the one key and the one value that all heads share; or its groups of heads."""
    if config.new_decoder_architecture or not config.multi_query:
        return parameter.chunk(world_size)[rank]
    both = 2 * config.head_dim
    queries, shared = parameter.split([len(parameter) - both, both])
    return torch.cat([queries.chunk(world_size)[rank], shared])


FALCON = Family(  # https://arxiv.org/abs/2311.16867
    model_types=("falcon",),
    blocks="h",
    embedding="word_embeddings",
    norm="ln_f",
    mixer_flops=rotary_attention_flops,
    packing="mask",  # transformers' Falcon makes its mask from the length alone, whatever the positions are
    tp_plan=TPPlan(
        token_mixers=("self_attention",),
        mlps=("mlp",),
        shard_dims={"self_attention.dense.weight": 1, **_DENSE_MLP},
        slicers={"self_attention.query_key_value.*": _falcon_heads},
        must_divide=("num_attention_heads", "num_kv_heads"),  # the former where all heads share one
        head_count_attrs=("num_heads", "num_kv_heads"),
        requires={"alibi": False},
    ),
    float8="its blocks add in place to what torchao's linear layers return",
)


def _router_loss(config: Any, logits: Any) -> torch.Tensor:
    # Switch Transformer's (https://arxiv.org/abs/2101.03961), equations 4 to 6, over the experts of all layers
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(config, "num_local_experts", None) or config.num_experts
    balance = load_balancing_loss_func(logits, experts, config.num_experts_per_tok)
    assert isinstance(balance, torch.Tensor), "no router logits"
    return balance


MOE = Family(  # https://arxiv.org/abs/2401.04088; the balance loss is trained if the config has output_router_logits
    model_types=("mixtral", "qwen2_moe", "qwen3_moe"),
    blocks="layers",
    embedding="embed_tokens",
    norm="norm",
    mixer_flops=rotary_attention_flops,
    packing="positions",
    router_loss=_router_loss,
    fullgraph=False,  # tokens per expert are known in the step only
    compiles=False,
    tp_plan=TPPlan(  # every rank has all experts, for its shard of the sequence
        token_mixers=("self_attn",),
        shard_dims=_ATTENTION,
        must_divide=("num_attention_heads", "num_key_value_heads"),
        requires={"output_router_logits": False},  # the balance loss is that of all tokens of a batch
    ),
)
OLMOE = replace(MOE, model_types=("olmoe",), tp_plan=_QK_NORMS)

ROWS = (LLAMA, OLMO2, GPT_NEOX, FALCON, MOE, OLMOE)
