"""Regions: modules of a block that see the whole sequence, while between them each rank holds a part of it.

A region gathers the sequence, computes with the rank's own heads or columns, and sums and scatters its result
(https://arxiv.org/abs/2205.05198). In a block all tensors are plain local ones, so that any kernel takes them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

SEQUENCE = Shard(1)  # of activations (batch, seq, hidden)


def move(x: Tensor, mesh: DeviceMesh, have: Placement, want: Placement, gradient: Placement | None = None) -> Tensor:
    """A local tensor that is `have` of a whole one as `want` of it; gradient: what comes back, if it is not `want`."""
    whole = DTensor.from_local(x, mesh, [have], run_check=False)
    return whole.redistribute(placements=[want]).to_local(grad_placements=[gradient or want])


def open_region(region: nn.Module, mesh: DeviceMesh, counts: tuple[str, ...]) -> None:
    """Make a module gather its input over the mesh and scatter its output, with its share of what `counts` name."""
    for module in region.modules():
        for name in set(counts) & vars(module).keys():
            count = getattr(module, name)
            if count % mesh.size() == 0:  # else it is of what all heads share
                setattr(module, name, count // mesh.size())
    change_input(region, lambda x: move(x, mesh, SEQUENCE, Replicate(), Partial()))
    # A clone, as what DTensor hands out is a view, and Falcon's blocks add to it in place.
    change_output(region, lambda x: move(x, mesh, Partial(), SEQUENCE).clone())


def change_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Change the hidden states before a module's forward: its first argument, or the one of that name."""

    def run(forward: Callable, *args: Any, **kwargs: Any) -> Any:
        if args:
            return forward(change(args[0]), *args[1:], **kwargs)
        return forward(**{**kwargs, "hidden_states": change(kwargs["hidden_states"])})

    module.forward = partial(run, module.forward)


def change_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Change the hidden states behind a module's forward: its result, or the first of several."""

    def run(forward: Callable, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    module.forward = partial(run, module.forward)


def change_parameters(module: nn.Module, change: Callable[[str, Tensor], Tensor]) -> None:
    """Have a module's forward see change(name, parameter) for each of its parameters, and only its forward."""

    def run(forward: Callable, *args: Any, **kwargs: Any) -> Any:
        held = [(path, owner, dict(owner._parameters)) for path, owner in module.named_modules()]
        try:
            for path, owner, parameters in held:
                for name, parameter in parameters.items():
                    if parameter is not None:
                        owner._parameters[name] = change(f"{path}.{name}".lstrip("."), parameter)
            return forward(*args, **kwargs)
        finally:
            for _, owner, parameters in held:
                owner._parameters.update(parameters)

    module.forward = partial(run, module.forward)
