"""How a step went, as all ranks know it alike: one all-reduce on the device, and one wait of the host."""

import struct
from typing import NamedTuple

import torch
import torch.distributed as dist

from flame.runtime.device import download, upload


class Outcome(NamedTuple):
    """What the host reads of a step.

    bad: a loss or the norm is not finite, while all ranks have data. exhausted: a rank has no data for the step.
    asked: 0, or the largest number that asks a rank to stop, as in flame.runtime.stop. due: a save is due by the clock
    of a rank. norm: of the whole job's gradients, before clipping. sums: what was summed over the ranks' data.
    """

    bad: bool
    exhausted: bool
    asked: int
    due: bool
    norm: float
    sums: list[int]


class Agreement:
    """The outcome of a step while it is on its way; launched behind the backward, by all ranks.

    loss: float scalar on the device, this rank's part. norm: float scalar, the same on all ranks that share gradients;
    on the CPU if they are offloaded.
    exhausted, asked, due: this rank's. sums: int64 (n,), the same on all ranks that share data.
    unfit: float32 scalar on the device, 1 if the step may not update anything and else 0: an optimizer's `found_inf`.
    """

    def __init__(
        self, loss: torch.Tensor, norm: torch.Tensor, sums: torch.Tensor, *, exhausted: bool, asked: int, due: bool
    ) -> None:
        norm = norm.to(loss.device)
        flags = upload(torch.tensor([1, exhausted, asked, due]), loss.device)
        if not exhausted:
            flags[0] = (loss - loss + norm - norm).isnan()  # zero of what is finite; isfinite() takes four kernels
        if dist.get_world_size() > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        self.unfit = flags[0].float()
        bits = norm.double().view(torch.int64)  # one copy carries integers and the norm
        self._read = download(torch.cat([flags, bits[None], sums]))

    def wait(self) -> Outcome:
        """Wait until the ranks have agreed, not for what was launched since."""
        unfit, exhausted, asked, due, bits, *sums = self._read().tolist()
        (norm,) = struct.unpack("d", struct.pack("q", bits))
        return Outcome(bool(unfit and not exhausted), bool(exhausted), asked, bool(due), norm, sums)
