"""torchtitan's CheckpointManager, with rotation that cannot delete the last good checkpoint."""

import os
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchtitan.components.checkpoint import CheckpointManager as TitanCheckpointManager
from torchtitan.tools.logging import logger

from flame.checkpoint.dcp_file import complete_steps
from flame.errors import UserError


def incomplete(folder: Path) -> list[Path]:
    """Checkpoints under `folder` that were never finished, or lost their metadata."""
    steps = {f"step-{step}" for step in complete_steps(folder)}
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.name not in steps)


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}.{n}" for n in count(2))


def _holds_training(checkpoint: Path) -> bool:
    """Whether a checkpoint holds more than the model: torchtitan's last_save_model_only leaves the rest out."""
    return "train_state.step" in dcp.FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata


class CheckpointManager(TitanCheckpointManager):
    """Saves when told that a save is due, resumes from complete checkpoints only, keeps the newest k of those.

    Mends of torchtitan 0.2.2: rotation counts half-written folders and export folders; an existing but empty folder
    hides `initial_load_path` and trains from random weights; overwriting a complete checkpoint leaves its metadata
    in place while its data change; the last save is not rotated, and `close` does not wait for an async save.
    """

    folder: str

    def __init__(self, *args: Any, checkpoint_config: Any, **kwargs: Any) -> None:
        super().__init__(*args, checkpoint_config=checkpoint_config, **kwargs)
        self.every_seconds = checkpoint_config.interval_type == "seconds"
        self.due = False  # set by the trainer, agreed by all ranks, when saves are counted in seconds

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        if self.every_seconds and self.enable and not self.load_only and not last_step:
            return self.due
        return super()._should_save(curr_step, last_step)

    def load(self, step: int = -1) -> bool:
        """Resume from step N, or from the newest complete checkpoint (-1). Returns whether anything was loaded."""
        if not self.enable:
            return False
        folder, steps = Path(self.folder), complete_steps(self.folder)
        for path in incomplete(folder):
            logger.warning(f"{path} is not complete and is not used")
        chosen = (steps[-1] if steps else None) if step == -1 else step
        if chosen and not _holds_training(folder / f"step-{chosen}"):
            raise UserError(
                f"--checkpoint.last_save_model_only: step-{chosen} in {folder} holds the model alone and cannot be "
                "resumed; start another run from it with --checkpoint.initial_load_path"
            )
        if not steps:  # at most the first save, cut short: flame.plan refuses more
            self._set_aside(incomplete(folder))
        if steps or (not self.initial_load_path and not self.initial_load_in_hf):
            loaded = super().load(steps[-1] if step == -1 and steps else step)
        else:  # torchtitan asks whether the folder exists; what counts is whether it holds a checkpoint
            self.folder = os.path.join(self.folder, "none")
            try:
                loaded = super().load(step)
            finally:
                self.folder = str(folder)
        if step > 0:  # the steps after it will be done again
            self._set_aside([folder / f"step-{later}" for later in steps if later > step])
        return loaded

    def _set_aside(self, checkpoints: list[Path]) -> None:
        """Move checkpoints of a course that is left to replaced/, where rotation and resume do not look."""
        if dist.get_rank() == 0:
            for path in checkpoints:
                aside = (path.parent / "replaced" / name for name in _numbered(path.name))
                target = next(candidate for candidate in aside if not candidate.exists())
                target.parent.mkdir(exist_ok=True)
                logger.warning(f"{path} is moved to {target}")
                os.replace(path, target)
        dist.barrier()

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 0:
            Path(checkpoint_id, ".metadata").unlink(missing_ok=True)  # a checkpoint that is overwritten is not complete
        dist.barrier()
        return super().dcp_save(state_dict, checkpoint_id, *args, **kwargs)

    def _save_last_step(self, curr_step: int) -> None:
        super()._save_last_step(curr_step)
        self._purge_stale_checkpoints()

    def _purge_stale_checkpoints(self) -> None:
        if self.keep_latest_k > 0 and dist.get_rank() == 0:
            for step in complete_steps(self.folder)[: -self.keep_latest_k]:
                self.purge_queue.put(self._create_checkpoint_id(step))

    def close(self) -> None:
        if getattr(self, "save_future", None) is not None:
            self._async_wait()
        super().close()
