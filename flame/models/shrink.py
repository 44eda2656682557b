"""A smaller model of the same kind, with fewer and narrower blocks, for checks that need its structure alone."""

from typing import Any

_SMALL = {"vocab_size": 320, "max_position_embeddings": 256}
_HEADS, _EXPERTS, _ROUTED, _WINDOW, _SLOTS = 4, 4, 2, 32, 16


def shrink(fields: dict[str, Any], config: Any, depth: int | None = None, width: int | None = None) -> dict[str, Any]:
    """The fields of a config with `depth` blocks (at least two) and a hidden size of `width`, where given.

    `config` is built from `fields`, and has their defaults. Grouped heads stay grouped, a hybrid keeps an attention
    layer, experts become few, and windows short enough to matter in a short row.
    """
    small, attn = dict(fields), getattr(config, "attn", None)
    if depth is not None:
        depth = max(2, depth)
        per_layer = [name for name in ("layer_types", "value_dim") if isinstance(fields.get(name), list)]
        small |= {"num_hidden_layers": depth, **{name: fields[name][:depth] for name in per_layer}}
        if attn:
            assert isinstance(attn, dict), "several kinds of attention layers"
            attn = attn | {"layers": [i for i in attn["layers"] if i < depth] or [depth - 1]}
    if width is not None:
        small |= _narrow(fields, config, width)
        if isinstance(small.get("value_dim"), list):  # RWKV-7's, one per block
            small["value_dim"] = [width * value // config.hidden_size for value in small["value_dim"]]
        small = {name: value for name, value in small.items() if not name.endswith("_token_id")}
        if attn:
            attn = attn | {"num_heads": _HEADS, "num_kv_heads": _HEADS, "window_size": _WINDOW}
    return small | ({"attn": attn} if attn else {})


def _narrow(fields: dict[str, Any], config: Any, width: int) -> dict[str, Any]:
    heads = fields.get("num_attention_heads") or fields.get("num_heads") or _HEADS
    few = min(_HEADS, heads)
    caps = {"num_experts": _EXPERTS, "num_local_experts": _EXPERTS, "num_experts_per_tok": _ROUTED, "num_slots": _SLOTS}
    caps |= {"sliding_window": _WINDOW, "window_size": _WINDOW, "num_attention_heads": few, "num_heads": few}
    caps |= {"intermediate_size": 2 * width, "moe_intermediate_size": width}
    small = {name: min(cap, fields[name]) for name, cap in caps.items() if fields.get(name)}
    for name in ("num_key_value_heads", "num_kv_heads", "num_v_heads"):
        if fields.get(name):
            small[name] = max(1, few * fields[name] // heads)
    if fields.get("head_dim"):
        per_width = fields["head_dim"] * heads / config.hidden_size
        small["head_dim"] = max(8, round(per_width * width / few))
    if (getattr(config, "expand_ratio", None) or 0) > 1:  # HGRN2's, the size of a head
        small["expand_ratio"] = width // few
    return {"hidden_size": width, **_SMALL, **small}
