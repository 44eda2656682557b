"""Model types of flash-linear-attention: attention, linear attention, gated recurrences, RWKV and state spaces.

Their kernels need a GPU; flame.models.reference serves them on a CPU. The delta rules are in flame.models.delta.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flame.models.family import Family, TPPlan, attention_flops, state_flops


def fla_family(
    *model_types: str,
    flops: Callable[[Any, int], float],
    norm: str = "norm",
    packed: bool = True,
    constants: Mapping[str, float] | None = None,
    tp_plan: TPPlan | str,
    stages: bool | str = True,
) -> Family:
    """A row of fla: its models share names, and mixers that take `cu_seqlens` keep packed documents apart."""
    return Family(
        model_types=model_types,
        blocks="layers",
        embedding="embeddings",
        norm=norm,
        mixer_flops=flops,
        packing="cu_seqlens" if packed else None,
        from_fla=True,
        constants=constants or {},
        fullgraph=False,  # its dispatched kernels are torch.compiler.disable'd, and its rotary embedding breaks as well
        tp_plan=tp_plan,
        stages=stages,
    )


def fla_tp_plan(*by_heads: str, must_divide: tuple[str, ...] = ("num_heads", "num_kv_heads"), **others: Any) -> TPPlan:
    """The TP plan of a mixer whose queries, keys, values, convolutions and parameters `by_heads` divide by heads."""
    heads = [f"attn.{name}" for name in ("[qkv]_proj.*", "g_proj.weight", "?_conv1d.*", *by_heads)]
    mlp = {"mlp.gate_proj.*": 0, "mlp.up_proj.*": 0, "mlp.down_proj.weight": 1}
    shard_dims = {**dict.fromkeys(heads, 0), "attn.o_proj.weight": 1, **mlp}
    others = {"head_count_attrs": ("num_heads", "num_kv_heads"), **others}
    return TPPlan(token_mixers=("attn",), mlps=("mlp",), shard_dims=shard_dims, must_divide=must_divide, **others)


def hybrid(mixer: Callable[[Any], float]) -> Callable[[Any, int], float]:
    """Forward FLOPs a token of all layers: `mixer(config)` each, but softmax attention in those that `attn` names."""

    def flops(config: Any, seq_len: int) -> float:
        specs = config.attn or []
        specs = specs if isinstance(specs, list) else [specs]
        attention = sum(
            len(spec["layers"]) * attention_flops(config.hidden_size, seq_len, spec.get("window_size"))
            for spec in specs
        )
        recurrent = config.num_hidden_layers - sum(len(spec["layers"]) for spec in specs)
        return attention + recurrent * mixer(config)

    return flops


def _transformer(config: Any, seq_len: int) -> float:
    return config.num_hidden_layers * attention_flops(config.hidden_size, seq_len, config.window_size)


def _mla(config: Any, seq_len: int) -> float:
    keys, values = config.num_heads * config.qk_head_dim, config.num_heads * config.v_head_dim
    return config.num_hidden_layers * attention_flops(keys, seq_len, config.window_size, value_width=values)


def _linear(config: Any) -> float:
    d_k, d_v = (config.hidden_size * expand / config.num_heads for expand in (config.expand_k, config.expand_v))
    return state_flops(config.num_heads, d_k, d_v)


def _gsa(config: Any) -> float:  # two states: queries read slots of keys, then slots of values
    d_k, d_v = (config.hidden_size * expand / config.num_heads for expand in (config.expand_k, config.expand_v))
    return state_flops(config.num_heads, d_k, config.num_slots) + state_flops(config.num_heads, config.num_slots, d_v)


def _hgrn(config: Any) -> float:
    return 0.0  # elementwise alone


def _hgrn2(config: Any) -> float:
    heads = config.num_heads if config.expand_ratio is None else config.hidden_size // config.expand_ratio
    ratio = config.expand_ratio or config.hidden_size // heads
    return state_flops(heads, ratio, config.hidden_size / heads)


def _lightnet(config: Any) -> float:
    heads = config.num_heads or config.hidden_size // config.expand_ratio
    ratio = config.expand_ratio or config.hidden_size // heads
    return state_flops(heads, ratio, config.hidden_size / heads)


def _rwkv7(config: Any) -> float:  # reads the state with a, writes that along b, writes k v^T, reads
    d_v = sum(config.value_dim) / len(config.value_dim) / config.num_heads
    return state_flops(config.num_heads, config.head_dim, d_v, passes=4)


def _mamba(config: Any, seq_len: int) -> float:
    return config.num_hidden_layers * state_flops(1, config.state_size, config.intermediate_size)


def _mamba2(config: Any, seq_len: int) -> float:
    return config.num_hidden_layers * state_flops(config.num_heads, config.state_size, config.head_dim)


def _samba(config: Any) -> float:
    return state_flops(1, config.state_size, config.intermediate_size)


_SPANS = "its output norm spans all heads"
_SCAN = "its scan is not divided by heads"
_BOUNDS = "the bounds of its decays, which every block reads, would be one parameter of several stages"

FLA_TRANSFORMER = fla_family("transformer", flops=_transformer, tp_plan=fla_tp_plan())
MLA = fla_family(
    "mla", flops=_mla, tp_plan="its low-rank keys and values are not divided"
)  # https://arxiv.org/abs/2405.04434
# https://arxiv.org/abs/2006.16236
LINEAR = fla_family("linear_attn", flops=hybrid(_linear), packed=False, tp_plan=fla_tp_plan())
# https://arxiv.org/abs/2307.08621: the decay of a head is its number's
RETNET = fla_family("retnet", flops=hybrid(_linear), tp_plan="the decay of each of its heads is by the head's number")
GLA = fla_family("gla", flops=hybrid(_linear), tp_plan=fla_tp_plan("gk_proj.1.*"))  # https://arxiv.org/abs/2312.06635
GSA = fla_family("gsa", flops=hybrid(_gsa), tp_plan=_SPANS)  # https://arxiv.org/abs/2409.07146
HGRN = fla_family(  # https://arxiv.org/abs/2311.04823
    "hgrn", flops=hybrid(_hgrn), constants={"lower_bounds": 0.0}, tp_plan=_SPANS, stages=_BOUNDS
)
HGRN2 = fla_family(  # https://arxiv.org/abs/2404.07904
    "hgrn2", flops=hybrid(_hgrn2), constants={"lower_bounds": 0.0}, tp_plan=_SPANS, stages=_BOUNDS
)
LIGHTNET = fla_family("lightnet", flops=hybrid(_lightnet), tp_plan=_SPANS)  # https://arxiv.org/abs/2405.21022
RWKV6 = fla_family(
    "rwkv6", flops=hybrid(_linear), tp_plan="its token shift is not divided"
)  # https://arxiv.org/abs/2404.05892
RWKV7 = fla_family(  # https://arxiv.org/abs/2503.14456
    "rwkv7",
    flops=hybrid(_rwkv7),
    tp_plan=TPPlan(
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
    ),
    stages="the values of its first block go to every other",
)
# These scans know no document boundaries, and would silently ignore them; linear_attn's model takes none.
# https://arxiv.org/abs/2312.00752
MAMBA = fla_family("mamba", flops=_mamba, norm="norm_f", packed=False, tp_plan=_SCAN)
# https://arxiv.org/abs/2405.21060
MAMBA2 = fla_family("mamba2", flops=_mamba2, norm="norm_f", packed=False, tp_plan=_SPANS)
# https://arxiv.org/abs/2406.07522
SAMBA = fla_family("samba", flops=hybrid(_samba), norm="norm_f", packed=False, tp_plan=_SCAN)

ROWS = (FLA_TRANSFORMER, MLA, LINEAR, RETNET, GLA, GSA, HGRN, HGRN2, LIGHTNET, RWKV6, RWKV7, MAMBA, MAMBA2, SAMBA)
