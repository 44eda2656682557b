"""What torchtitan's schedules lack: a schedule that is a function of the step and of today's configuration."""

from typing import Any

from torchtitan.components.lr_scheduler import LRSchedulersContainer, build_lr_schedulers


class Schedule(LRSchedulersContainer):
    """torchtitan's schedules, of which a checkpoint holds the step alone.

    torchtitan 0.2.2 also saves `base_lrs`, so that a new --optimizer.lr is silently ignored on resume while new
    steps, warm-up and decay take effect.
    """

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.schedulers[0].last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for scheduler in self.schedulers:
            scheduler.last_epoch = state_dict["last_epoch"]

    def apply(self) -> None:
        """Write the step's learning rate into the optimizers, whose own state a checkpoint has just overwritten."""
        for scheduler in self.schedulers:
            rates = [
                base * factor(scheduler.last_epoch)
                for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            scheduler._last_lr = rates
            for group, base, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, rates, strict=True):
                group["initial_lr"], group["lr"] = base, rate


def build_schedule(optimizers: Any, lr_scheduler_config: Any, training_steps: int) -> Schedule:
    """torchtitan's `build_lr_schedulers_fn`: linear, cosine and WSD decay after a linear warm-up."""
    schedule = build_lr_schedulers(optimizers, lr_scheduler_config, training_steps)
    schedule.__class__ = Schedule
    assert isinstance(schedule, Schedule)
    return schedule
