"""A learning-rate schedule that depends on the step and the current configuration alone."""

from typing import Any

from torchtitan.components.lr_scheduler import LRSchedulersContainer, build_lr_schedulers


class LRSchedule(LRSchedulersContainer):
    """torchtitan's schedules; a checkpoint holds the step alone.

    Workaround: torchtitan 0.2.2 (components/lr_scheduler.py) saves `base_lrs` too, so that a resumed run silently
    ignores a new --optimizer.lr while new steps, warm-up and decay take effect.
    """

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.schedulers[0].last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for scheduler in self.schedulers:
            scheduler.last_epoch = state_dict["last_epoch"]

    def apply(self) -> tuple[float, float]:
        """Write the step's learning rate into the optimizers, whose state a checkpoint has just overwritten.

        Returns the first one's rate before and after.
        """
        first = self.schedulers[0].optimizer.param_groups[0]
        before = float(first["lr"])
        for scheduler in self.schedulers:
            rates = [
                base * factor(scheduler.last_epoch)
                for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            scheduler._last_lr = rates
            for group, base, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, rates, strict=True):
                group["initial_lr"], group["lr"] = base, rate
        return before, float(first["lr"])


def build_lr_schedule(optimizers: Any, lr_scheduler_config: Any, training_steps: int) -> LRSchedule:
    """torchtitan's `build_lr_schedulers_fn`: linear, cosine and WSD decay after a linear warm-up."""
    schedule = build_lr_schedulers(optimizers, lr_scheduler_config, training_steps)
    schedule.__class__ = LRSchedule
    assert isinstance(schedule, LRSchedule)
    return schedule
