"""Model types of flash-linear-attention: softmax and linear attention, delta rules, recurrences, state spaces.

Their kernels need a GPU; flame.models.reference serves them on a CPU.
"""

from collections.abc import Callable
from typing import Any

import torch

from flame.models.family import Family, TPPlan
from flame.models.flops import attention_flops, state_flops


def _family(model_type: str, flops: Callable[[Any, int], float], tp_plan: TPPlan | str, **others: Any) -> Family:
    """A row of fla, whose models share names and whose mixers take `cu_seqlens`, unless `others` differ."""
    # its kernels are torch.compiler.disable'd, and its rotary embedding breaks the graph too
    fields: dict[str, Any] = {"norm": "norm", "packing": "cu_seqlens", "fullgraph": False, "compiles": False, **others}
    fields |= {"blocks": "layers", "embedding": "embeddings", "from_fla": True}
    return Family(model_types=(model_type,), mixer_flops=flops, tp_plan=tp_plan, **fields)


def _tp_plan(*by_heads: str, must_divide: tuple[str, ...] = ("num_heads", "num_kv_heads"), **others: Any) -> TPPlan:
    """The TP plan of a mixer whose heads divide queries, keys, values, convolutions and the parameters `by_heads`."""
    heads = [f"attn.{name}" for name in ("[qkv]_proj.*", "g_proj.weight", "?_conv1d.*", *by_heads)]
    mlp = {"mlp.gate_proj.*": 0, "mlp.up_proj.*": 0, "mlp.down_proj.weight": 1}
    shard_dims = {**dict.fromkeys(heads, 0), "attn.o_proj.weight": 1, **mlp}
    others = {"head_count_attrs": ("num_heads", "num_kv_heads"), **others}
    return TPPlan(token_mixers=("attn",), mlps=("mlp",), shard_dims=shard_dims, must_divide=must_divide, **others)


def _hybrid(mixer: Callable[[Any], float]) -> Callable[[Any, int], float]:
    """Forward FLOPs per token of all layers: `mixer(config)` each, but softmax attention in those that `attn` names."""

    def flops(config: Any, seq_len: int) -> float:
        specs = getattr(config, "attn", None) or []
        total, recurrent = 0.0, config.num_hidden_layers
        for spec in specs if isinstance(specs, list) else [specs]:
            recurrent -= len(spec["layers"])
            total += len(spec["layers"]) * attention_flops(config.hidden_size, seq_len, spec.get("window_size"))
        return total + recurrent * mixer(config)

    return flops


def _transformer(config: Any, seq_len: int) -> float:
    return config.num_hidden_layers * attention_flops(config.hidden_size, seq_len, config.window_size)


def _mla(config: Any, seq_len: int) -> float:
    keys, values = config.num_heads * config.qk_head_dim, config.num_heads * config.v_head_dim
    return config.num_hidden_layers * attention_flops(keys, seq_len, config.window_size, value_width=values)


def _head_dims(config: Any) -> tuple[float, float]:
    return tuple(config.hidden_size * expand / config.num_heads for expand in (config.expand_k, config.expand_v))


def _linear(config: Any) -> float:
    return state_flops(config.num_heads, *_head_dims(config))


def _gsa(config: Any) -> float:  # two states: queries read slots of keys, then slots of values
    d_k, d_v = _head_dims(config)
    slots = d_k if config.num_slots is None else config.num_slots
    return state_flops(config.num_heads, d_k, slots) + state_flops(config.num_heads, slots, d_v)


def _hgrn2(config: Any) -> float:
    heads = config.num_heads if config.expand_ratio is None else config.hidden_size // config.expand_ratio
    return state_flops(heads, config.expand_ratio or config.hidden_size // heads, config.hidden_size / heads)


def _lightnet(config: Any) -> float:
    heads = config.num_heads or config.hidden_size // config.expand_ratio
    return state_flops(heads, config.expand_ratio or config.hidden_size // heads, config.hidden_size / heads)


def _delta_net(config: Any) -> float:  # reads the old value, writes the difference, reads
    return state_flops(config.num_heads, *_head_dims(config), passes=3)


def _gated_delta_net(config: Any) -> float:
    heads = config.num_v_heads or config.num_heads
    return state_flops(heads, config.head_dim, config.head_dim * config.expand_v, passes=3)


def _delta_product(config: Any) -> float:  # several writes per token, one read
    passes = 2 * config.num_householder + 1
    return state_flops(config.num_heads, config.head_dim, config.head_dim * config.expand_v, passes)


def _rwkv7(config: Any) -> float:  # reads the state with a, writes that along b, writes k v^T, reads
    d_v = sum(config.value_dim) / len(config.value_dim) / config.num_heads
    return state_flops(config.num_heads, config.head_dim, d_v, passes=4)


def _mamba(config: Any) -> float:
    return state_flops(1, config.state_size, config.intermediate_size)


def _mamba2(config: Any) -> float:
    return state_flops(config.num_heads, config.state_size, config.head_dim)


def _own_heads(config: Any, parameter: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """The rank's heads of each of several writes, one after the other."""
    return parameter.unflatten(0, (config.num_householder, -1)).chunk(world_size, 1)[rank].flatten(0, 1)


_NORM = "its output norm spans all heads"
_SCAN = "its scan is not divided by heads"
_RETNET = "each head's decay depends on the head's number"
_DECAYS = ("A_log", "dt_bias")
# Their scans know no document boundaries and would silently ignore them.
_STATE_SPACE: dict[str, Any] = {"norm": "norm_f", "packing": None}
_HGRN: dict[str, Any] = {
    "constants": {"lower_bounds": 0.0},
    "stages": "its stages would share one parameter, the bounds of its decays",
}
_GATED: dict[str, Any] = {
    "must_divide": ("num_heads", "num_v_heads"),
    "head_count_attrs": ("num_heads", "num_v_heads", "key_dim", "value_dim"),
}
_PRODUCT = dict.fromkeys(["attn.[kvb]_proj.*", "attn.[kv]_conv1d.*"], _own_heads)
_RWKV7 = TPPlan(
    token_mixers=("attn", "ffn"),
    shard_dims={
        **dict.fromkeys([f"attn.{name}" for name in ("k_k", "k_a", "r_k", "[rkv]_proj.weight", "g_norm.*")], 0),
        "attn.?_lora.lora.2.*": 0,
        "attn.o_proj.weight": 1,
        "ffn.key.weight": 0,
        "ffn.value.weight": 1,
    },
    must_divide=("num_heads",),
    head_count_attrs=("num_heads", "num_groups"),
)

ROWS = (
    _family("transformer", _transformer, _tp_plan(), compiles=True),
    _family("mla", _mla, "its low-rank keys and values are not divided"),  # https://arxiv.org/abs/2405.04434
    _family("linear_attn", _hybrid(_linear), _tp_plan(), packing=None),  # https://arxiv.org/abs/2006.16236
    _family("retnet", _hybrid(_linear), _RETNET),  # https://arxiv.org/abs/2307.08621
    _family("gla", _hybrid(_linear), _tp_plan("gk_proj.1.*"), compiles=True),  # https://arxiv.org/abs/2312.06635
    _family("gsa", _hybrid(_gsa), _NORM),  # https://arxiv.org/abs/2409.07146
    _family("hgrn", _hybrid(lambda _: 0.0), _NORM, **_HGRN),  # elementwise only; https://arxiv.org/abs/2311.04823
    _family("hgrn2", _hybrid(_hgrn2), _NORM, **_HGRN, compiles=True),  # https://arxiv.org/abs/2404.07904
    _family("lightnet", _hybrid(_lightnet), _NORM),  # https://arxiv.org/abs/2405.21022
    # https://arxiv.org/abs/2404.05892
    _family("rwkv6", _hybrid(_linear), "its token shift is not divided", compiles=True),
    # https://arxiv.org/abs/2503.14456
    _family("rwkv7", _hybrid(_rwkv7), _RWKV7, stages="every block reads the values of the first"),
    _family("mamba", _hybrid(_mamba), _SCAN, **_STATE_SPACE),  # https://arxiv.org/abs/2312.00752
    _family("mamba2", _hybrid(_mamba2), _NORM, **_STATE_SPACE),  # https://arxiv.org/abs/2405.21060
    _family("samba", _hybrid(_mamba), _SCAN, **_STATE_SPACE),  # https://arxiv.org/abs/2406.07522
    # The delta rule: before it writes a value, a state forgets what it held under the same key.
    _family("delta_net", _hybrid(_delta_net), _tp_plan("b_proj.*")),  # https://arxiv.org/abs/2406.06484
    # https://arxiv.org/abs/2412.06464
    _family("gated_deltanet", _hybrid(_gated_delta_net), _tp_plan("[ab]_proj.*", *_DECAYS, **_GATED)),
    # https://arxiv.org/abs/2510.26692: a decay per channel
    _family("kda", _hybrid(_gated_delta_net), _tp_plan("b_proj.*", "[fg]_proj.1.*", *_DECAYS, **_GATED)),
    # https://arxiv.org/abs/2502.10297
    _family("gated_deltaproduct", _hybrid(_delta_product), _tp_plan("a_proj.*", *_DECAYS, slicers=_PRODUCT, **_GATED)),
)
