"""Tensor parallelism with sequence parallelism, for every family, as its TPPlan says.

Outside of forward the parameters are DTensors, so that FSDP, clipping and checkpoints see them whole; inside it each
rank has its shard of them as a plain tensor. See flame.parallel.sequence_parallel.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from flame.models.family import TPPlan
from flame.models.parameters import local_tensor
from flame.parallel import sequence_parallel as sp


def apply_tensor_parallel(model: Any, mesh: DeviceMesh, plan: TPPlan) -> None:
    """Shard the modules of a flame.models.causal_lm.CausalLM on the meta device over `mesh`."""
    for block in model.layers.values():
        _distribute(block, mesh, plan.shard_dim)
        sp.make_sequence_parallel(block, mesh, plan.token_mixers + plan.mlps, plan.head_count_attrs)
        sp.transform_parameters(block, partial(_local_parameter, model.hf.config, mesh, plan))
    for name, part in model.parts():
        if part is model.embedding:
            parallelize_module(part, mesh, RowwiseParallel(input_layouts=Replicate()))
        elif part is model.head:
            _distribute(part, mesh, lambda _: 0)  # along the vocabulary; flame.models.loss takes it as it is
        elif name != model.family.blocks:
            _distribute(part, mesh, lambda _: None)
            sp.transform_parameters(part, lambda _: local_tensor)


def shard_activations(model: Any, mesh: DeviceMesh) -> None:
    """Shard the sequence over the ranks from the first block to the last; after compile, which wants equal blocks."""
    blocks = list(model.layers.values())
    sp.transform_hidden(blocks[0], before=lambda x: sp.redistribute(x, mesh, Replicate(), sp.SEQUENCE))
    sp.transform_hidden(blocks[-1], after=lambda x: sp.redistribute(x, mesh, sp.SEQUENCE, Replicate()))


def _distribute(module: nn.Module, mesh: DeviceMesh, shard_dim: Callable[[str], int | None]) -> None:
    for path, owner in module.named_modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            dim = shard_dim(f"{path}.{name}".lstrip("."))
            placement: Placement = Replicate() if dim is None else Shard(dim)
            whole = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
            owner.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def _local_parameter(config: Any, mesh: DeviceMesh, plan: TPPlan, name: str) -> sp.Transform:
    """How a rank's tensor is made from a block's parameter."""
    if plan.shard_dim(name) is not None:
        return local_tensor
    if plan.is_rowwise_bias(name):
        # Divided before it is replicated, its gradient after it is summed: torch.compile merges equal all-reduces, and
        # gradients of two biases that are added up would share one memory, which clipping scales twice.
        return lambda parameter: _replicated(local_tensor(parameter) / mesh.size(), mesh)
    if slicer := plan.slicer(name):
        rank, size = mesh.get_local_rank(), mesh.size()
        return lambda parameter: slicer(config, _replicated(local_tensor(parameter), mesh), rank, size)
    return lambda parameter: _replicated(local_tensor(parameter), mesh)


def _replicated(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """A replicated tensor whose gradient is summed over the ranks."""
    return sp.redistribute(value, mesh, Replicate(), Replicate(), Partial())
