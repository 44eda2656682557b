"""A row for a causal language model that has none: its names are read off the model itself.

Its loss comes from transformers' own forward, so it is right whatever the model does to its logits; it is not fused.
Its heads and columns are divided as transformers' own plan for tensor parallelism says, if that is all it does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn

from flame.errors import UserError
from flame.models.family import Family, TPPlan
from flame.models.llama import rotary_attention_flops

# {a style of transformers' plans: the parameters it divides, and along which dimension}
_DIVIDED = {"colwise": ("*", 0), "rowwise": ("weight", 1)}


def read_family(hf: nn.Module, model_type: str, from_fla: bool) -> Family:
    """The row of a transformers model, which may be on the meta device.

    Raises UserError if its parts are not where FSDP, activation checkpointing and compile need them.
    """
    backbone: Any = hf.base_model
    config: Any = hf.config
    embedding = hf.get_input_embeddings()  # type: ignore[operator]
    children = dict(backbone.named_children())
    blocks = [name for name, child in children.items() if isinstance(child, nn.ModuleList)]
    tables = [name for name, child in children.items() if child is embedding]
    if len(blocks) != 1 or len(tables) != 1:
        raise _refusal(model_type, "its blocks and its embedding are not children of its backbone")
    own = [name for name, _ in (*backbone.named_parameters(recurse=False), *backbone.named_buffers(recurse=False))]
    if own:
        raise _refusal(model_type, f"its backbone holds {own[0]} itself")
    with torch.device("meta"):
        for number, block in enumerate(children[blocks[0]]):
            _check(model_type, block, partial(cast(Any, type(block)), config, number))
        for part in children.values():
            if not list(part.parameters()) and list(part.buffers()):
                _check(model_type, part, partial(cast(Any, type(part)), config=config))
    return Family(
        model_types=(model_type,),
        blocks=blocks[0],
        embedding=tables[0],
        norm=list(children)[-1],
        mixer_flops=_flops,
        packing=None,
        from_fla=from_fla,
        fused_loss=False,
        fullgraph=False,
        tp_plan=_cut(config, blocks[0], children[blocks[0]]),
    )


def _cut(config: Any, name: str, blocks: nn.Module) -> TPPlan | str:
    """How the blocks of this name are divided by transformers' plan, or why they are not."""
    whole, none = f"{name}.*.", "and flame.models.table no row"
    if getattr(config, "is_heterogeneous", False) and (differing := config.per_layer_attributes):
        return f"its layers differ in {min(differing)}, {none}"
    plan = {key.removeprefix(whole): how for key, how in (config.base_model_tp_plan or {}).items() if whole in key}
    if not plan:
        return f"transformers has no plan for it (base_model_tp_plan), {none}"
    if other := set(plan.values()) - _DIVIDED.keys() - {"replicated_with_grad_allreduce"}:
        return f"transformers' plan for it (base_model_tp_plan) has {min(other)}, {none}"
    divided = {key: _DIVIDED[how] for key, how in plan.items() if how in _DIVIDED}
    regions = sorted({key.rpartition(".")[0] for key in divided})
    mixers = tuple(region for region in regions if "att" in region)
    # Outside of all regions a matrix may mix tokens, and would see a part of them, in one it may be of all heads; a
    # vector is that of a norm.
    matrices = [key.partition(".")[2] for key, parameter in blocks.named_parameters() if parameter.ndim > 1]
    if left := [key for key in matrices if not mixers or key.rpartition(".")[0] not in divided]:
        return f"transformers' plan for it (base_model_tp_plan) leaves out {left[0]}, {none}"
    heads = ("num_attention_heads", "num_key_value_heads")
    return TPPlan(
        token_mixers=mixers,
        mlps=tuple(region for region in regions if region not in mixers),
        shard_dims={f"{key}.{parameters}": dim for key, (parameters, dim) in divided.items()},
        must_divide=tuple(name for name in heads if getattr(config, name, None) is not None),
        head_count_attrs=("num_heads", *heads),
    )


def _check(model_type: str, module: nn.Module, build: Callable[[], nn.Module]) -> None:
    """Whether a module can be built anew as flame.models.causal_lm does. Raises UserError."""
    try:
        found = _shapes(build())
    except Exception as error:  # whatever another constructor says when it is called in this way
        raise _refusal(model_type, f"{type(module).__name__} is built in a way of its own: {error!s:.60}") from None
    if found != _shapes(module):
        raise _refusal(model_type, f"{type(module).__name__} is built in a way of its own")


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def _flops(config: Any, seq_len: int) -> float:
    try:
        return rotary_attention_flops(config, seq_len)
    except (AttributeError, TypeError):
        return 0.0  # a mixer nothing is known of: its weights alone are counted


def _refusal(model_type: str, reason: str) -> UserError:
    return UserError(
        f'--model.config: model_type "{model_type}" has no row in flame.models.table, and cannot do without: {reason}; '
        "docs/add_new_model.md shows how to give it one (--model.import)"
    )
