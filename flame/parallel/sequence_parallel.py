"""Sequence-parallel blocks: modules that all-gather the sequence, while between them each rank holds a shard of it.

Such a module gathers its input, computes with the rank's own heads or columns, and reduce-scatters its output
(https://arxiv.org/abs/2205.05198). Inside a block all tensors are plain local ones, so that any kernel takes them.
Modules get mixin classes and not closures, so that torch.compile compiles identical blocks once.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

SEQUENCE = Shard(1)  # of activations (batch, seq, hidden)
Transform = Callable[[Tensor], Tensor]


def redistribute(x: Tensor, mesh: DeviceMesh, src: Placement, dst: Placement, grad: Placement | None = None) -> Tensor:
    """A local tensor of placement `src` as one of placement `dst`; grad: its incoming gradient's, if not `dst`."""
    return _Redistribute.apply(x, mesh, src, dst, grad or dst)


class _Redistribute(torch.autograd.Function):
    """DTensor's redistribution; written as a Function, as torch.compile gets the gradient of DTensor's own wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, src: Placement, dst: Placement, gradient: Placement) -> Tensor:
        ctx.mesh, ctx.src, ctx.dst = mesh, gradient, Replicate() if src.is_partial() else src
        return _redistribute(x, mesh, src, dst)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _redistribute(gradient, ctx.mesh, ctx.src, ctx.dst), None, None, None, None


def _redistribute(x: Tensor, mesh: DeviceMesh, src: Placement, dst: Placement) -> Tensor:
    return DTensor.from_local(x, mesh, [src], run_check=False).redistribute(placements=[dst]).to_local()


def make_sequence_parallel(
    block: nn.Module, mesh: DeviceMesh, names: tuple[str, ...], head_count_attrs: tuple[str, ...]
) -> None:
    """Make a block's named modules all-gather their input and reduce-scatter their output; divide their head counts.

    Called for several meshes, the last one divides what the others have divided.
    """
    for module in (module for name, module in block.named_modules() if name in names):
        for child in module.modules():
            for name in set(head_count_attrs) & vars(child).keys():
                count = getattr(child, name)
                if count % mesh.size() == 0:  # else all heads share it
                    setattr(child, name, count // mesh.size())
        _add_mixin(module, _SequenceParallel).meshes = (mesh, *getattr(module, "meshes", ()))


class _SequenceParallel(nn.Module):
    meshes: tuple[DeviceMesh, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for mesh in self.meshes:
            gather = partial(redistribute, mesh=mesh, src=SEQUENCE, dst=Replicate(), grad=Partial())
            args, kwargs = _apply_to_input(gather, args, kwargs)
        output = super().forward(*args, **kwargs)
        for mesh in reversed(self.meshes):
            scatter = partial(redistribute, mesh=mesh, src=Partial(), dst=SEQUENCE)
            output = _apply_to_output(scatter, output)
        return output


def transform_hidden(module: nn.Module, before: Transform | None = None, after: Transform | None = None) -> None:
    """Transform the hidden states before a module's forward (its first argument, or `hidden_states`), or after it."""

    def run(forward: Callable, *args: Any, **kwargs: Any) -> Any:
        if before is not None:
            args, kwargs = _apply_to_input(before, args, kwargs)
        output = forward(*args, **kwargs)
        return output if after is None else _apply_to_output(after, output)

    module.forward = partial(run, module.forward)


def _apply_to_input(transform: Transform, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if args:
        return (transform(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": transform(kwargs["hidden_states"])}


def _apply_to_output(transform: Transform, output: Any) -> Any:
    return (transform(output[0]), *output[1:]) if isinstance(output, tuple) else transform(output)


def transform_parameters(module: nn.Module, choose: Callable[[str], Transform | None]) -> None:
    """Make a module's forward, and nothing else, see choose(name)(parameter), for each name where it is not None.

    Called again, the later transform is applied first.
    """
    in_forward = getattr(module, "in_forward", None) or _InForward()
    _add_mixin(module, _TracksForward).in_forward = in_forward
    for path, owner in module.named_modules():
        for name, _ in list(owner.named_parameters(recurse=False)):
            if transform := choose(f"{path}.{name}".lstrip(".")):
                reader = _add_mixin(owner, _transformed_parameter(name))
                earlier = getattr(owner, "transforms", {})
                reader.transforms = {**earlier, name: (transform, *earlier.get(name, ()))}
                reader.in_forward = in_forward


class _InForward:
    now = False  # between forwards FSDP reads a module's parameters, and must see them whole


class _TracksForward(nn.Module):
    in_forward: _InForward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.in_forward.now = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.in_forward.now = False


@cache
def _transformed_parameter(name: str) -> type:
    def read(module: Any) -> Tensor:
        value = module._parameters[name]
        if module.in_forward.now:
            for transform in module.transforms[name]:
                value = transform(value)
        return value

    return type("_TransformedParameter", (nn.Module,), {name: property(read)})


def _add_mixin(module: Any, mixin: type) -> Any:
    """The module, with the mixin before its class."""
    if not isinstance(module, mixin):
        module.__class__ = _with_mixin(mixin, module.__class__)
    return module


@cache
def _with_mixin(mixin: type, kind: type) -> type:
    return type(kind.__name__, (mixin, kind), {})
