"""Trainers that go wrong on purpose."""

import torch

from flame.trainer import FlameTrainer


class PoisonedGradient(FlameTrainer):
    """One rank's gradient turns NaN in step 3; checks that the update of that step changed nothing."""

    def forward_backward_step(self, **arguments):
        loss = super().forward_backward_step(**arguments)
        if self.step == 3:
            next(self.model_parts[0].parameters()).grad.fill_(float("nan"))
        return loss

    def train_step(self, data_iterator):
        before = [p.detach().clone() for p in self.model_parts[0].parameters()]
        super().train_step(data_iterator)
        changed = any(not torch.equal(a, b) for a, b in zip(before, self.model_parts[0].parameters(), strict=True))
        assert changed == (self.step != 3)
