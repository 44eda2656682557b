"""Decisions that all ranks of a run make alike, over gloo: no GPU is waited for; each costs a round trip."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from flame.errors import UserError

Answer = TypeVar("Answer")


class RankConsensus:
    """Collectives over all ranks. Every call is made by all ranks, in the same order.

    timeout: how long a rank waits for the others before it fails; None: gloo's default of half an hour.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self._world_size = dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=timeout) if self._world_size > 1 else None

    def max(self, *values: int) -> list[int]:
        """The maximum over all ranks of each value."""
        maxima = torch.tensor(values, dtype=torch.int64)
        if self._group is not None:
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group=self._group)
        return maxima.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        gathered = [value] * self._world_size
        if self._group is not None:
            dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def each(self, ask: Callable[[], Answer]) -> list[Answer]:
        """What `ask` returns on every rank, in rank order.

        Raises UserError, on all ranks, if `ask` raises one on any, or an OSError, which becomes one of the run folder.
        """
        answer: Answer | UserError
        try:
            answer = ask()
        except UserError as error:
            answer = error
        except OSError as error:
            answer = UserError("--job.dump_folder", hint=str(error))
        answers = self.gather(answer)
        if first_error := next((answer for answer in answers if isinstance(answer, UserError)), None):
            raise first_error
        return answers

    def first(self, ask: Callable[[], Answer]) -> Answer:
        """What `ask` returns on rank 0, on all ranks. Raises as `each` does."""
        return cast(Answer, self.each(lambda: ask() if dist.get_rank() == 0 else None)[0])
