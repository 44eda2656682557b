"""Regions: modules of a block that see the whole sequence, while between them each rank holds a part of it.

A region gathers the sequence, computes with the rank's own heads or columns, and sums and scatters its result
(https://arxiv.org/abs/2205.05198). In a block all tensors are plain local ones, so that any kernel takes them.
Modules are given classes, and no closures of their own: torch.compile then compiles alike blocks once.
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
Change = Callable[[Tensor], Tensor]


def redistribute(
    x: Tensor, mesh: DeviceMesh, have: Placement, want: Placement, gradient: Placement | None = None
) -> Tensor:
    """A local tensor that is `have` of a whole one as `want` of it; gradient: what comes back, if it is not `want`."""
    return _Move.apply(x, mesh, have, want, gradient or want)


class _Move(torch.autograd.Function):
    """DTensor's redistribution of local tensors; torch.compile does not get its own gradient right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, have: Placement, want: Placement, gradient: Placement) -> Tensor:
        ctx.mesh, ctx.have, ctx.want = mesh, gradient, Replicate() if have.is_partial() else have
        return _redistribute(x, mesh, have, want)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _redistribute(gradient, ctx.mesh, ctx.have, ctx.want), None, None, None, None


def _redistribute(x: Tensor, mesh: DeviceMesh, have: Placement, want: Placement) -> Tensor:
    whole = DTensor.from_local(x, mesh, [have], run_check=False)
    return whole.redistribute(placements=[want]).to_local()


def open_region(region: nn.Module, mesh: DeviceMesh, counts: tuple[str, ...]) -> None:
    """Make a module gather its input over the mesh and scatter its output, with its share of what `counts` name.

    Of several meshes, the one opened last divides what the others have divided.
    """
    for module in region.modules():
        for name in set(counts) & vars(module).keys():
            count = getattr(module, name)
            if count % mesh.size() == 0:  # else it is of what all heads share
                setattr(module, name, count // mesh.size())
    opened: Any = _mix(region, _Region)
    opened.meshes = (mesh, *getattr(region, "meshes", ()))


class _Region(nn.Module):
    meshes: tuple[DeviceMesh, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for mesh in self.meshes:
            args, kwargs = _with_input(partial(_gather, mesh), args, kwargs)
        output = super().forward(*args, **kwargs)
        for mesh in reversed(self.meshes):
            output = _with_output(partial(_scatter, mesh), output)
        return output


def _gather(mesh: DeviceMesh, x: Tensor) -> Tensor:
    return redistribute(x, mesh, SEQUENCE, Replicate(), Partial())


def _scatter(mesh: DeviceMesh, x: Tensor) -> Tensor:
    return redistribute(x, mesh, Partial(), SEQUENCE)


def transform_input(module: nn.Module, change: Change) -> None:
    """Change the hidden states before a module's forward: its first argument, or the one of that name."""

    def run(forward: Callable, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _with_input(change, args, kwargs)
        return forward(*args, **kwargs)

    module.forward = partial(run, module.forward)


def transform_output(module: nn.Module, change: Change) -> None:
    """Change the hidden states behind a module's forward: its result, or the first of several."""

    def run(forward: Callable, *args: Any, **kwargs: Any) -> Any:
        return _with_output(change, forward(*args, **kwargs))

    module.forward = partial(run, module.forward)


def _with_input(change: Change, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def _with_output(change: Change, output: Any) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def transform_parameters(module: nn.Module, choose: Callable[[str], Change | None]) -> None:
    """Have a module's forward, and nothing else, see choose(name)(parameter) of its parameters, where it is not None.

    What is changed last is changed first in forward.
    """
    seen: Any = _mix(module, _Forward)
    seen.inside = getattr(module, "inside", None) or _Inside()
    for path, owner in module.named_modules():
        for name, _ in list(owner.named_parameters(recurse=False)):
            if change := choose(f"{path}.{name}".lstrip(".")):
                reader: Any = _mix(owner, _reader(name))
                changes = getattr(owner, "changes", {})
                reader.changes = {**changes, name: (change, *changes.get(name, ()))}
                reader.inside = seen.inside


class _Inside:
    """Whether a module is in its forward; between forwards FSDP reads its parameters, and must see them whole."""

    now = False


class _Forward(nn.Module):
    inside: _Inside

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.inside.now = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.inside.now = False


@cache
def _reader(name: str) -> type:
    def read(module: Any) -> Tensor:
        value = module._parameters[name]
        if module.inside.now:
            for change in module.changes[name]:
                value = change(value)
        return value

    return type("_Reader", (nn.Module,), {name: property(read)})


def _mix(module: nn.Module, mixin: type) -> nn.Module:
    """The module, with the mixin before its class."""
    if not isinstance(module, mixin):
        kind: Any = module.__class__
        module.__class__ = _mixed(mixin, kind)
    return module


@cache
def _mixed(mixin: type, kind: type) -> type:
    return type(kind.__name__, (mixin, kind), {})
