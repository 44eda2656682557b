"""A row for a causal language model that has none in the table, read off the model itself.

Its loss comes from transformers' own forward, so it is right whatever the model does to its logits, but not fused. Its
heads and columns are divided as transformers' own TP plan says, if that plan has only column-wise and row-wise layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn

from flame.errors import UserError
from flame.models.attention import rotary_attention_flops
from flame.models.family import Family, TPPlan

# {a style of transformers' plans: (the parameters that it shards, along which dimension)}
_SHARDED = {"colwise": ("*", 0), "rowwise": ("weight", 1)}


def read_family(hf: nn.Module, model_type: str, from_fla: bool) -> Family:
    """The row of a transformers model, which may be on the meta device.

    Raises UserError if its modules are not where FSDP, activation checkpointing and compile need them, or cannot be
    rebuilt one by one.
    """
    backbone: Any = hf.base_model
    config: Any = hf.config
    embedding = hf.get_input_embeddings()  # type: ignore[operator]
    children = dict(backbone.named_children())
    blocks = [name for name, child in children.items() if isinstance(child, nn.ModuleList)]
    embeddings = [name for name, child in children.items() if child is embedding]
    if len(blocks) != 1 or len(embeddings) != 1:
        raise _needs_row(model_type, "its blocks and its embedding are not children of its backbone")
    own = [name for name, _ in (*backbone.named_parameters(recurse=False), *backbone.named_buffers(recurse=False))]
    if own:
        raise _needs_row(model_type, f"its backbone itself has the tensor {own[0]}")
    with torch.device("meta"):
        for number, block in enumerate(children[blocks[0]]):
            _check_rebuild(model_type, block, partial(cast(Any, type(block)), config, number))
        for module in children.values():
            if not list(module.parameters()) and list(module.buffers()):
                _check_rebuild(model_type, module, partial(cast(Any, type(module)), config=config))
    return Family(
        model_types=(model_type,),
        blocks=blocks[0],
        embedding=embeddings[0],
        norm=list(children)[-1],
        mixer_flops=_mixer_flops,
        packing=None,
        from_fla=from_fla,
        fused_loss=False,
        fullgraph=False,
        compiles=False,
        tp_plan=_read_tp_plan(config, blocks[0], children[blocks[0]]),
    )


def _read_tp_plan(config: Any, name: str, blocks: nn.Module) -> TPPlan | str:
    """transformers' TP plan for the blocks of this name, or why it does not do."""
    prefix, no_row = f"{name}.*.", "and flame.models.table no row"
    if getattr(config, "is_heterogeneous", False) and (differing := config.per_layer_attributes):
        return f"its layers differ in {min(differing)}, {no_row}"
    plan = {key.removeprefix(prefix): how for key, how in (config.base_model_tp_plan or {}).items() if prefix in key}
    if not plan:
        return f"transformers has no plan for it (base_model_tp_plan), {no_row}"
    if other := set(plan.values()) - _SHARDED.keys() - {"replicated_with_grad_allreduce"}:
        return f"transformers' plan for it (base_model_tp_plan) has {min(other)}, {no_row}"
    sharded = {key: _SHARDED[how] for key, how in plan.items() if how in _SHARDED}
    modules = sorted({key.rpartition(".")[0] for key in sharded})
    mixers = tuple(module for module in modules if "att" in module)
    # Any other matrix may mix tokens, of which it would see a shard, or belong to all heads; a vector is a norm's.
    matrices = [key.partition(".")[2] for key, parameter in blocks.named_parameters() if parameter.ndim > 1]
    if left := [key for key in matrices if not mixers or key.rpartition(".")[0] not in sharded]:
        return f"transformers' plan for it (base_model_tp_plan) leaves out {left[0]}, {no_row}"
    heads = ("num_attention_heads", "num_key_value_heads")
    return TPPlan(
        token_mixers=mixers,
        mlps=tuple(module for module in modules if module not in mixers),
        shard_dims={f"{key}.{parameters}": dim for key, (parameters, dim) in sharded.items()},
        must_divide=tuple(name for name in heads if getattr(config, name, None) is not None),
        head_count_attrs=("num_heads", *heads),
    )


def _check_rebuild(model_type: str, module: nn.Module, build: Callable[[], nn.Module]) -> None:
    """Check that flame.models.causal_lm can rebuild a module for its initial weights. Raises UserError if not."""
    reason = f"{type(module).__name__} is not built from a config and a number"
    try:
        found = _shapes(build())
    except Exception as error:  # whatever a constructor with other arguments raises
        raise _needs_row(model_type, f"{reason}: {error!s:.60}") from None
    if found != _shapes(module):
        raise _needs_row(model_type, reason)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def _mixer_flops(config: Any, seq_len: int) -> float:
    try:
        return rotary_attention_flops(config, seq_len)
    except (AttributeError, TypeError):
        return 0.0  # an unknown mixer: only its weights count


def _needs_row(model_type: str, reason: str) -> UserError:
    found, hint = f"model_type {model_type!r} without a row in flame.models.table", "docs/add_new_model.md adds one"
    return UserError("--model.config", found, hint=f"{reason}; {hint} (--model.import)")
