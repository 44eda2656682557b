"""The delta rule in fla's models: before it writes a value, a state forgets what it held under the same key."""

from typing import Any

import torch

from flame.models.family import state_flops
from flame.models.fla import fla_family, fla_tp_plan, hybrid


def _delta_net(config: Any) -> float:  # reads the old value, writes the difference, reads
    d_k, d_v = (config.hidden_size * expand / config.num_heads for expand in (config.expand_k, config.expand_v))
    return state_flops(config.num_heads, d_k, d_v, passes=3)


def _gated(config: Any) -> float:
    heads = config.num_v_heads or config.num_heads
    return state_flops(heads, config.head_dim, config.head_dim * config.expand_v, passes=3)


def _product(config: Any) -> float:  # several writes a token, one read
    passes = 2 * config.num_householder + 1
    return state_flops(config.num_heads, config.head_dim, config.head_dim * config.expand_v, passes)


def _own_heads(config: Any, parameter: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """The rank's heads of each of several writes, one behind the other."""
    return parameter.unflatten(0, (config.num_householder, -1)).chunk(ranks, 1)[rank].flatten(0, 1)


_HEADS = ("num_heads", "num_v_heads")
_SIZES = {"head_count_attrs": ("num_heads", "num_v_heads", "key_dim", "value_dim")}
DELTA_NET = fla_family(
    "delta_net", flops=hybrid(_delta_net), tp_plan=fla_tp_plan("b_proj.*")
)  # https://arxiv.org/abs/2406.06484
GATED_DELTANET = fla_family(  # https://arxiv.org/abs/2412.06464
    "gated_deltanet",
    flops=hybrid(_gated),
    tp_plan=fla_tp_plan("a_proj.*", "b_proj.*", "A_log", "dt_bias", must_divide=_HEADS, **_SIZES),
)
KDA = fla_family(  # https://arxiv.org/abs/2510.26692: a decay a channel
    "kda",
    flops=hybrid(_gated),
    tp_plan=fla_tp_plan("b_proj.*", "[fg]_proj.1.*", "A_log", "dt_bias", must_divide=_HEADS, **_SIZES),
)
GATED_DELTAPRODUCT = fla_family(  # https://arxiv.org/abs/2502.10297
    "gated_deltaproduct",
    flops=hybrid(_product),
    tp_plan=fla_tp_plan(
        *("a_proj.*", "A_log", "dt_bias"),
        must_divide=_HEADS,
        slicers=dict.fromkeys(["attn.[kvb]_proj.*", "attn.[kv]_conv1d.*"], _own_heads),
        **_SIZES,
    ),
)

ROWS = (DELTA_NET, GATED_DELTANET, KDA, GATED_DELTAPRODUCT)
