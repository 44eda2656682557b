"""Context parallelism: a rank holds a part of the sequence, and in a mixer the whole of it for a part of the heads.

What mixes tokens sees the whole sequence (see flame.parallel.sequence_parallel); everything else works on the rank's
own tokens. So any mixer, kernel and packing of documents is exact, and no rank has more work than another. Parameters
stay whole, and FSDP adds the gradients of the ranks, each of which knows those of its heads and tokens. In place of the
gathered hidden states, the all-to-all of https://arxiv.org/abs/2309.14509 moves heads; the shares of work are the same.
"""

from functools import partial
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate

from flame.models.family import Cut
from flame.parallel.sequence_parallel import (
    SEQUENCE,
    Change,
    open_region,
    redistribute,
    transform_input,
    transform_output,
    transform_parameters,
)


def divide_heads(model: Any, mesh: DeviceMesh, cut: Cut) -> None:
    """Have each rank compute its heads of a flame.models.causal_lm.CausalLM's mixers, before tensor parallelism."""
    rank, ranks = mesh.get_local_rank(), mesh.size()
    for block in model.layers.values():
        for region in (module for name, module in block.named_modules() if name in cut.mixers):
            open_region(region, mesh, cut.counts)
        transform_parameters(block, partial(_change, model.hf.config, rank, ranks, cut))


def divide_sequences(model: Any, mesh: DeviceMesh) -> None:
    """Give each rank its part of the sequence between mixers; behind tensor parallelism, which divides the part again.

    The model still takes whole sequences on every rank.
    """
    rank, ranks = mesh.get_local_rank(), mesh.size()
    blocks = list(model.layers.values())
    transform_input(blocks[0], lambda x: x.chunk(ranks, 1)[rank].contiguous())
    if model.head is None:  # a pipeline's next stage begins with the whole sequence again
        transform_output(blocks[-1], lambda x: redistribute(x, mesh, SEQUENCE, Replicate(), Partial()))
    model.sequence_part = (rank, ranks)


def _change(config: Any, rank: int, ranks: int, cut: Cut, name: str) -> Change | None:
    """How the rank's heads of a mixer's parameter are taken; None: it needs all of the parameter."""
    if not name.startswith(tuple(f"{mixer}." for mixer in cut.mixers)):
        return None
    if cut.is_summed(name):
        return lambda parameter: parameter / ranks
    if pick := cut.pick(name):
        return lambda parameter: pick(config, parameter, rank, ranks)
    dim = cut.dimension(name)
    return None if dim is None else lambda parameter: parameter.chunk(ranks, dim)[rank]
