"""Tensor parallelism with sequence parallelism: one rule for every family, whose row says what is cut.

Outside of forward the parameters are DTensors, so that FSDP, clipping and checkpoints see them whole; inside it each
rank has its part of them as a plain tensor. See flame.parallel.sequence_parallel.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from flame.models.family import Cut
from flame.models.parameters import local_tensor
from flame.parallel.sequence_parallel import (
    SEQUENCE,
    Change,
    open_region,
    redistribute,
    transform_input,
    transform_output,
    transform_parameters,
)


def apply_tensor_parallel(model: Any, mesh: DeviceMesh, cut: Cut) -> None:
    """Cut the parts of a flame.models.causal_lm.CausalLM on the meta device over `mesh` as `cut` says."""
    config, blocks = model.hf.config, list(model.layers.values())
    for block in blocks:
        _distribute(block, mesh, cut.dimension)
        for region in (module for name, module in block.named_modules() if name in (*cut.mixers, *cut.columns)):
            open_region(region, mesh, cut.counts)
        transform_parameters(block, partial(_change, config, mesh, cut))
    for name, part in model.parts():
        if part is model.embedding:
            parallelize_module(part, mesh, RowwiseParallel(input_layouts=Replicate()))
        elif part is model.head:
            _distribute(part, mesh, lambda _: 0)  # along the vocabulary; flame.models.loss takes it as it is
        elif name != model.family.blocks:
            _distribute(part, mesh, lambda _: None)
            transform_parameters(part, lambda _: local_tensor)


def divide_activations(model: Any, mesh: DeviceMesh) -> None:
    """Give each rank its part of the sequence from the first block to the last; after compile, which has alike blocks
    then."""
    blocks = list(model.layers.values())
    transform_input(blocks[0], lambda x: redistribute(x, mesh, Replicate(), SEQUENCE))
    transform_output(blocks[-1], lambda x: redistribute(x, mesh, SEQUENCE, Replicate()))


def _distribute(module: nn.Module, mesh: DeviceMesh, cut: Callable[[str], int | None]) -> None:
    for path, owner in module.named_modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            dim = cut(f"{path}.{name}".lstrip("."))
            placement: Placement = Replicate() if dim is None else Shard(dim)
            whole = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
            owner.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def _change(config: Any, mesh: DeviceMesh, cut: Cut, name: str) -> Change:
    """How a rank's part of a block's parameter is made of it."""
    if cut.dimension(name) is not None:
        return local_tensor
    if cut.is_summed(name):
        # Divided before it is shared, its gradient after it is summed: torch.compile merges equal all-reduces, and the
        # gradients of two regions' biases that are added up would lie in one memory, which clipping scales twice.
        return lambda parameter: _shared(local_tensor(parameter) / mesh.size(), mesh)
    if pick := cut.pick(name):
        rank, ranks = mesh.get_local_rank(), mesh.size()
        return lambda parameter: pick(config, _shared(local_tensor(parameter), mesh), rank, ranks)
    return lambda parameter: _shared(local_tensor(parameter), mesh)


def _shared(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """What all ranks have alike, and each finds a part of the gradient of."""
    return redistribute(value, mesh, Replicate(), Replicate(), Partial())
