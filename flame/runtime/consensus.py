"""Decisions that all ranks of a run make alike, over gloo: no GPU is waited for; each costs a round trip."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from flame.errors import UserError, first_line

Answer = TypeVar("Answer")
_CANNOT_CONNECT = ("connectFullMesh failed", "Unable to find")  # gloo: the other ranks, an interface or its address


class RankConsensus:
    """Collectives over all ranks. Every call is made by all ranks, in the same order.

    timeout: how long a rank waits for the others before it fails; connect: the same for the first time, in which the
    ranks connect.
    """

    def __init__(self, timeout: timedelta, connect: timedelta) -> None:
        self._world_size = dist.get_world_size()
        self._group = None
        if self._world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=connect)
            dist.distributed_c10d._set_pg_timeout(timeout, self._group)

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
        """What `ask` returns on every rank, in rank order: each rank is told the answers of all.

        Raises UserError, on all ranks, if `ask` raises one on any, or an OSError, which becomes one of the run folder.
        """
        return [_given(answer) for answer in self.gather(_try(ask))]

    def first(self, ask: Callable[[], Answer]) -> Answer:
        """What `ask` returns on rank 0, on all ranks. Raises as `each` does."""
        answer = [_try(ask) if dist.get_rank() == 0 else None]
        if self._group is not None:
            dist.broadcast_object_list(answer, src=0, group=self._group)
        return _given(cast(Answer, answer[0]))


def _try(ask: Callable[[], Answer]) -> Answer | UserError:
    try:
        return ask()
    except UserError as error:
        return error
    except OSError as error:
        return UserError("--job.dump_folder", hint=str(error))


def _given(answer: Answer | UserError) -> Answer:
    if isinstance(answer, UserError):
        raise answer
    return answer


@contextmanager
def naming_interface() -> Iterator[None]:
    """Raise UserError if the ranks cannot connect over gloo: it took a network interface that does not reach them.

    A rank that ends meanwhile ("Connection closed by peer") says nothing of the interface.
    """
    try:
        yield
    except RuntimeError as error:
        if "by peer" in str(error) or not any(said in str(error) for said in _CANNOT_CONNECT):
            raise
        allowed = "the network interface by which the nodes reach each other, as `ip address` names it on each"
        raise UserError(
            "GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "no value"), allowed, first_line(error)
        ) from None
