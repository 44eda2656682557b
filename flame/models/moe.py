"""Mixtures of experts: Llama's attention, and MLPs of which a router picks a few for each token
(https://arxiv.org/abs/2401.04088). The routers' balance is trained where the config says `output_router_logits`.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from flame.models.family import Family, TPPlan
from flame.models.llama import rotary_attention_flops


def _router_loss(config: Any, logits: Any) -> Tensor:
    # Switch Transformer's (https://arxiv.org/abs/2101.03961), equations 4 to 6, over the experts of all layers.
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(config, "num_local_experts", None) or config.num_experts
    balance = load_balancing_loss_func(logits, experts, config.num_experts_per_tok)
    assert isinstance(balance, Tensor), "no router's logits"
    return balance


MOE = Family(
    model_types=("mixtral", "qwen2_moe", "qwen3_moe"),
    blocks="layers",
    embedding="embed_tokens",
    norm="norm",
    mixer_flops=rotary_attention_flops,
    packing="positions",
    router_loss=_router_loss,
    fullgraph=False,  # which experts are hit is only known in the step
    tp_plan=TPPlan(  # every rank has all experts, and sends its part of the sequence through them
        token_mixers=("self_attn",),
        shard_dims={**{f"self_attn.{name}_proj.*": 0 for name in "qkv"}, "self_attn.o_proj.weight": 1},
        must_divide=("num_attention_heads", "num_key_value_heads"),
        requires={"output_router_logits": False},  # a balance is that of all tokens of a batch
    ),
)

OLMOE = replace(MOE, model_types=("olmoe",), tp_plan="its norms of queries and keys span all heads")
