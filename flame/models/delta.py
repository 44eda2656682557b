"""The delta rule in fla's models: before it writes a value, a state forgets what it held under the same key."""

from typing import Any

from flame.models.family import state_flops
from flame.models.fla import fla_family, hybrid


def _delta_net(config: Any) -> float:  # reads the old value, writes the difference, reads
    d_k, d_v = (config.hidden_size * expand / config.num_heads for expand in (config.expand_k, config.expand_v))
    return state_flops(config.num_heads, d_k, d_v, passes=3)


def _gated(config: Any) -> float:
    heads = config.num_v_heads or config.num_heads
    return state_flops(heads, config.head_dim, config.head_dim * config.expand_v, passes=3)


def _product(config: Any) -> float:  # several writes a token, one read
    passes = 2 * config.num_householder + 1
    return state_flops(config.num_heads, config.head_dim, config.head_dim * config.expand_v, passes)


DELTA_NET = fla_family("delta_net", flops=hybrid(_delta_net))  # https://arxiv.org/abs/2406.06484
# https://arxiv.org/abs/2412.06464 and, with a decay a channel, https://arxiv.org/abs/2510.26692
GATED_DELTANET = fla_family("gated_deltanet", "kda", flops=hybrid(_gated))
GATED_DELTAPRODUCT = fla_family("gated_deltaproduct", flops=hybrid(_product))  # https://arxiv.org/abs/2502.10297

ROWS = (DELTA_NET, GATED_DELTANET, GATED_DELTAPRODUCT)
