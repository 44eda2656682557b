"""What all ranks of a run decide alike, over gloo: it waits for no GPU, and costs a round trip between the hosts."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from flame.errors import UserError

Answer = TypeVar("Answer")


class Agreement:
    """One number or one finding of each rank, made known to all. Every call is made by all ranks, in the same order.

    timeout: how long a rank waits for the others before it fails; None: as long as gloo does, half an hour.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self._ranks = dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=timeout) if self._ranks > 1 else None

    def highest(self, *values: int) -> list[int]:
        """The highest of all ranks, of each value."""
        found = torch.tensor(values, dtype=torch.int64)
        if self._group is not None:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        return found.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks."""
        found = [value] * self._ranks
        if self._group is not None:
            dist.all_gather_object(found, value, group=self._group)
        return found


def agree(ranks: Agreement, ask: Callable[[], Answer]) -> Answer:
    """The answer of the first rank, or the UserError that it met, on all ranks; an OSError becomes one."""
    answer: Answer | UserError | None = None
    if dist.get_rank() == 0:
        try:
            answer = ask()
        except UserError as error:
            answer = error
        except OSError as error:
            answer = UserError(f"--job.dump_folder: {error}")
    first = ranks.gather(answer)[0]
    if isinstance(first, UserError):
        raise first
    return first
