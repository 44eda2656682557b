"""Context parallelism: each rank holds a shard of the sequence, and in token mixers all of it for its own heads.

Token mixers are sequence-parallel (see flame.parallel.sequence_parallel), and everything else works on the rank's own
tokens. So any mixer, kernel and packing of documents is exact, and all ranks have equal work. Parameters stay whole,
and FSDP sums the gradients of the ranks. Ulysses (https://arxiv.org/abs/2309.14509) divides the same work by an
all-to-all of heads in place of the all-gather of hidden states.
"""

from functools import partial
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate

from flame.models.family import TPPlan
from flame.parallel import sequence_parallel as sp


def apply_context_parallel(model: Any, mesh: DeviceMesh, plan: TPPlan) -> None:
    """Divide the heads of a flame.models.causal_lm.CausalLM's token mixers over `mesh`; before tensor parallelism."""
    rank, size = mesh.get_local_rank(), mesh.size()
    for block in model.layers.values():
        sp.make_sequence_parallel(block, mesh, plan.token_mixers, plan.head_count_attrs)
        sp.transform_parameters(block, partial(_own_heads, model.hf.config, rank, size, plan))


def shard_sequence(model: Any, mesh: DeviceMesh) -> None:
    """Give each rank its shard of the sequence between token mixers; the model's input stays the whole sequence.

    Call it after tensor parallelism, which divides the shard again.
    """
    rank, size = mesh.get_local_rank(), mesh.size()
    blocks = list(model.layers.values())
    sp.transform_hidden(blocks[0], before=lambda x: x.chunk(size, 1)[rank].contiguous())
    if model.head is None:  # a pipeline's next stage begins with the whole sequence again
        sp.transform_hidden(blocks[-1], after=lambda x: sp.redistribute(x, mesh, sp.SEQUENCE, Replicate(), Partial()))
    model.sequence_shard = (rank, size)


def _own_heads(config: Any, rank: int, size: int, plan: TPPlan, name: str) -> sp.Transform | None:
    """How the rank's heads of a token mixer's parameter are taken; None: it needs all of the parameter."""
    if not name.startswith(tuple(f"{mixer}." for mixer in plan.token_mixers)):
        return None
    if plan.is_rowwise_bias(name):
        return lambda parameter: parameter / size
    if slicer := plan.slicer(name):
        return lambda parameter: slicer(config, parameter, rank, size)
    dim = plan.shard_dim(name)
    return None if dim is None else lambda parameter: parameter.chunk(size, dim)[rank]
