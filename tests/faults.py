"""Trainers whose data or gradients are made odd on purpose."""

import time

import torch
import torch.distributed as dist

from flame.trainer import FlameTrainer


class PoisonedGradient(FlameTrainer):
    """One rank's gradient turns NaN in step 3; checks that the update of that step, and no other, changed nothing."""

    def forward_backward_step(self, **arguments):
        loss = super().forward_backward_step(**arguments)
        if self.step == 3 and dist.get_rank() == 0:
            next(self.model_parts[0].parameters()).grad.fill_(float("nan"))
        return loss

    def train_step(self, data_iterator):
        before = [p.detach().clone() for p in self.model_parts[0].parameters()]
        super().train_step(data_iterator)
        pairs = zip(before, self.model_parts[0].parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs) == (self.step != 3)


class MaskedLabels(FlameTrainer):
    """About a third of the labels do not count: those whose token id is a multiple of three."""

    def _collect(self, data_iterator):
        microbatches, exhausted = super()._collect(data_iterator)
        return [(inputs, labels.masked_fill(labels % 3 == 0, -100)) for inputs, labels in microbatches], exhausted


class EndingData(FlameTrainer):
    """The data of the last rank end in step 3, while the others have more."""

    def _collect(self, data_iterator):
        if self.step == 3 and dist.get_rank() == dist.get_world_size() - 1:
            return [], True
        return super()._collect(data_iterator)


class SlowData(FlameTrainer):
    """The last rank waits a second for the data of step 2."""

    def batch_generator(self, data_iterable):
        def slow():
            for number, batch in enumerate(data_iterable, 1):
                if number == 2 and dist.get_rank() == dist.get_world_size() - 1:
                    time.sleep(1)
                yield batch

        return super().batch_generator(slow())
