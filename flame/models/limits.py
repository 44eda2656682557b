"""Rejects a model config with values that are not numbers, or with sizes that do not fit together or fit no memory."""

from typing import Any

from transformers import PreTrainedConfig

from flame.errors import UserError
from flame.models.family import each_layer
from flame.models.flops import TOP_K_FIELDS, top_k

_NEEDED = ("hidden_size", "vocab_size")
_SIZES = (
    *("num_attention_heads", "num_key_value_heads", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"),
    *("max_position_embeddings", "num_slots"),
)
_WINDOWS = ("sliding_window", "window_size")  # 0 is none
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_LAYERS, _MOST_EXPERTS = 4096, 2**17  # a model is built and looked at block by block, expert by expert


def validate(config: PreTrainedConfig, source: str) -> None:
    """Check the types of numbers, dropout, and the sizes of layers, heads and experts; fla's configs check nothing.

    Raises UserError, which names the field of `source`.
    """
    layers = getattr(config, "num_hidden_layers", None)
    if type(layers) is not int or not 1 <= layers <= _LAYERS:
        raise UserError(f"{source}: num_hidden_layers", repr(layers), f"an integer from 1 to {_LAYERS}")
    for name, default in vars(type(config)()).items():
        value = vars(config).get(name)
        if name.endswith("_token_id"):
            ids = value if isinstance(value, list) else [value]
            if value is not None and not all(type(each) is int for each in ids):
                raise UserError(f"{source}: {name}", repr(value), "an id, or a list of ids")
        elif type(default) in (int, float) and value is not None:
            if not isinstance(value, int | float):
                raise UserError(f"{source}: {name}", repr(value), "a number")
            if "drop" in name and not 0 <= value <= 1:
                raise UserError(f"{source}: {name}", value, "from 0 to 1")
    for layer in each_layer(config):
        _validate_layer(layer, layers, source)


def _validate_layer(layer: Any, layers: int, source: str) -> None:
    """Check the sizes of one of a model's layers."""
    sizes: dict[str, Any] = {name: getattr(layer, name, None) for name in (*_NEEDED, *_SIZES, *_WINDOWS, *_EXPERTS)}
    for name, size in sizes.items():
        if (size is None and name not in _NEEDED) or (isinstance(size, list) and name == "intermediate_size"):
            continue  # a list: a size for each layer
        least = 0 if name in (*_WINDOWS, *_EXPERTS) else 1
        if type(size) is not int or not least <= size < 2**31:
            spelled = getattr(layer, "attribute_map", {}).get(name, name)  # GPT-2's config says n_embd
            raise UserError(f"{source}: {spelled}", repr(size), f"an integer, {least} or more and below 2^31")
    _validate_heads(layer, sizes, source)
    experts_name = next((name for name in _EXPERTS if sizes[name]), "")
    if not experts_name:
        return
    experts, chosen = sizes[experts_name], top_k(layer)
    if experts < chosen:
        name = next(name for name in TOP_K_FIELDS if getattr(layer, name, None))
        raise UserError(f"{source}: {name}", chosen, f"at most {experts}, the number of experts")
    if experts * layers > _MOST_EXPERTS:
        allowed = f"at most {_MOST_EXPERTS // layers} in each of {layers} layers"
        raise UserError(f"{source}: {experts_name}", experts, allowed)


def _validate_heads(layer: Any, sizes: dict[str, Any], source: str) -> None:
    name = "num_attention_heads" if sizes["num_attention_heads"] else "num_heads"
    heads, hidden = sizes[name], sizes["hidden_size"]
    if not heads:
        return
    for shared in ("num_key_value_heads", "num_kv_heads"):
        if sizes[shared] and heads % sizes[shared]:
            raise UserError(f"{source}: {shared}", sizes[shared], f"a divisor of {name}, {heads}")
    if hidden % heads and not any(value for field, value in vars(layer).items() if "head_" in field):
        raise UserError(f"{source}: {name}", heads, f"a divisor of hidden_size, {hidden}")
    rope = getattr(layer, "rope_parameters", None)
    tables = (rope, *rope.values()) if isinstance(rope, dict) and not getattr(layer, "alibi", False) else ()
    for found in (found for found in tables if isinstance(found, dict)):  # one, or one for each kind of layer
        share = found.get("partial_rotary_factor", 1.0)
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise UserError(f"{source}: partial_rotary_factor", repr(share), "more than 0 and at most 1")
        if (turned := int((sizes["head_dim"] or hidden // heads) * share)) % 2:
            raise UserError(f"{source}: head_dim", f"{turned} of its elements", "even, as rotary positions turn pairs")
