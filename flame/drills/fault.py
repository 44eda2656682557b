"""Trainers with a fault at one step, on the last rank, so that the others must learn of it."""

import resource
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist

from flame.drills.job import FAULT_STEP, STALL_SECONDS
from flame.training.trainer import Batch, FlameTrainer

__all__ = ["DiskFull", "FlameTrainer", "NanGradient", "Slow", "Stall"]


def is_last_rank() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def limit_file_size(size: int) -> None:
    """Let no file of this process grow beyond `size` bytes, -1 for any: what a full disk does to a checkpoint."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class NanGradient(FlameTrainer):
    """A gradient becomes NaN."""

    def forward_backward_step(self, **arguments: Any) -> Any:
        loss = super().forward_backward_step(**arguments)
        if self.step == FAULT_STEP and is_last_rank():
            parameter = next(p for part in self.model_parts for p in part.parameters() if p.grad is not None)
            parameter.grad.fill_(float("nan"))
        return loss


class Stall(FlameTrainer):
    """The data makes a rank wait, as a file system or the hub may."""

    stall_step, stall_seconds = FAULT_STEP, STALL_SECONDS

    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:
        def stalling() -> Iterator[Batch]:
            for number, batch in enumerate(data_iterable, 1):
                if number == self.stall_step and is_last_rank():
                    time.sleep(self.stall_seconds)
                yield batch

        return super().batch_generator(stalling())


class Slow(FlameTrainer):
    """Every step takes a tenth of a second longer, so that there is time to signal the job."""

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        time.sleep(0.1)
        super().train_step(data_iterator)


class DiskFull(FlameTrainer):
    """No file of a rank can grow beyond a small size."""

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        if self.step == FAULT_STEP and is_last_rank():
            limit_file_size(100_000)  # more than the drills' logs have, less than a checkpoint
        super().train_step(data_iterator)
