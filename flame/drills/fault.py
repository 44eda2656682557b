"""Trainers with a fault in step FAULT; the last rank has it, so that the others must learn of it."""

import resource
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist

from flame.drills.job import FAULT, STALL
from flame.training.trainer import Batch, FlameTrainer

__all__ = ["DiskFull", "FlameTrainer", "NanGradient", "Slow", "Stall"]

FILE_BYTES = 100_000  # more than a log of the drills has, less than a checkpoint


def _is_last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


class NanGradient(FlameTrainer):
    """A gradient turns NaN."""

    def forward_backward_step(self, **arguments: Any) -> Any:
        loss = super().forward_backward_step(**arguments)
        if self.step == FAULT and _is_last():
            parameter = next(p for part in self.model_parts for p in part.parameters() if p.grad is not None)
            parameter.grad.fill_(float("nan"))
        return loss


class Stall(FlameTrainer):
    """The data keep a rank waiting, as a file system or a hub may."""

    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:
        def stalling() -> Iterator[Batch]:
            for number, batch in enumerate(data_iterable, 1):
                if number == FAULT and _is_last():
                    time.sleep(STALL)
                yield batch

        return super().batch_generator(stalling())


class Slow(FlameTrainer):
    """Every step takes a tenth of a second longer, so that there is time to do something to it."""

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        time.sleep(0.1)
        super().train_step(data_iterator)


class DiskFull(FlameTrainer):
    """No file of a rank grows beyond a small size any more: what a full disk does to a checkpoint."""

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        if self.step == FAULT and _is_last():
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        super().train_step(data_iterator)
