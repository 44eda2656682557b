"""A checkpoint manager in one process, with the least around it that it needs."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.optimizer import OptimizersContainer

from flame.checkpoint.manager import CheckpointManager
from flame.config.schema import JobConfig
from flame.training.context import RunContext


class Trainer:
    """What the manager knows of a trainer: counters, which it saves and loads, and the run's context."""

    def __init__(self, job_config: JobConfig) -> None:
        self.context = RunContext(job_config)
        self.step, self.tokens, self.data_digest = 0, 0, ""

    def check_state(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens, "data_digest": self.data_digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Counter:
    """A state of one number, as that of a schedule or a data stream."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Job:
    """A model of one matrix, whose elements are the last step, and its manager; needs a process group."""

    def __init__(self, folder: Path, width: int = 8, weight_decay: float = 0.1, **checkpoint: Any) -> None:
        config = JobConfig()
        config.job.dump_folder = str(folder)
        config.checkpoint = dataclasses.replace(config.checkpoint, **{"interval": 2, "keep_latest_k": 0, **checkpoint})
        self.model = torch.nn.Linear(width, 8, bias=False)
        self.optimizers = OptimizersContainer([self.model], torch.optim.AdamW, {"weight_decay": weight_decay})
        self.trainer, self.data = Trainer(config), Counter()
        self.manager = CheckpointManager(
            dataloader=self.data,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=Counter(),
            states={"train_state": self.trainer},
            checkpoint_config=config.checkpoint,
            sd_adapter=None,
            base_folder=str(folder),
        )

    def run(self, steps: int) -> "Job":
        """Do what a trainer does: start, and save after each step up to the last."""
        self.manager.load(self.trainer.context.job_config.checkpoint.load_step)
        self.manager.consensus.first(self.manager.archive_replaced)
        while self.trainer.step < steps:
            self.trainer.step += 1
            self.trainer.tokens += 100
            self.data.count += 1
            torch.nn.init.constant_(self.model.weight, self.trainer.step)
            self.manager.save(self.trainer.step, last_step=self.trainer.step == steps)
        self.manager.close()
        return self
