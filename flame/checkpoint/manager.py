"""torchtitan's CheckpointManager that saves whole checkpoints or none, and starts from a verified one or none."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import tomli
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torchtitan.components.checkpoint import MODEL, OPTIMIZER, TRAIN_STATE, AsyncMode
from torchtitan.components.checkpoint import CheckpointManager as TitanCheckpointManager
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import GarbageCollection

from flame.checkpoint.commit import (
    MARKER,
    archive,
    complete_steps,
    inspect_checkpoint,
    mark_for_deletion,
    pending_deletions,
    read_marker,
    remove_incomplete,
)
from flame.checkpoint.start import StartPlan, changed_settings, check_resumable, step_of
from flame.checkpoint.verification import find_intact
from flame.checkpoint.writer import Writer
from flame.config.parser import recorded, to_toml
from flame.config.schema import JobConfig
from flame.errors import SaveError, UserError
from flame.runtime.consensus import RankConsensus

_OF_CHECKPOINT = (
    "params",
    "lr",
    "initial_lr",
)  # of optimizer groups; lr_schedule writes the rates
_ANOTHER_MODEL = ("Size mismatch", "Missing key")  # how DCP says that tensors are not those of the model


class Context(Protocol):
    """What the manager shares with the rest of the run; flame.training.context."""

    job_config: JobConfig

    @property
    def consensus(self) -> RankConsensus: ...

    @property
    def start(self) -> StartPlan: ...


class Trained(Protocol):
    """The train state that is saved and loaded, and what is asked of it; flame.training.trainer."""

    context: Context
    step: int
    tokens: int
    data_digest: str

    def check_state(self) -> None:
        """Raises, on all ranks, if the state may not be saved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class CheckpointManager(TitanCheckpointManager):
    """Saves when a save is due, starts as --checkpoint.start asks, and keeps the newest k checkpoints.

    Mends of torchtitan 0.2.2: rotation counts half-written folders and export folders; an existing but empty folder
    hides `initial_load_path` and trains from random weights; a checkpoint that is damaged is loaded all the same; a
    resume takes betas, eps and weight decay from the checkpoint, whatever the settings are; the last save is not
    rotated, and `close` does not wait for an async save.
    """

    folder: str

    def __init__(self, *args: Any, checkpoint_config: Any, **kwargs: Any) -> None:
        super().__init__(*args, checkpoint_config=checkpoint_config, **kwargs)
        self.config = checkpoint_config
        self.trainer: Trained = self.states[TRAIN_STATE]
        self.consensus = self.trainer.context.consensus
        self.every_seconds = checkpoint_config.interval_type == "seconds"
        self.last_save = time.monotonic()  # for intervals in seconds
        self.saving = ""  # the checkpoint that was begun last
        self.origin: dict[str, Any] = {"mode": "scratch"}  # what `load` did

    # -- saving -------------------------------------------------------------------------------------------------------

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """Save if a save is due. Raises SaveError, on all ranks, as --checkpoint.on_save_failure says."""
        if last_step:
            self._wait_out()
        try:
            super().save(curr_step, last_step)
        except CheckpointException as error:
            self._settle(error, final=last_step)

    def save_full(self, step: int) -> None:
        """Save all that a resume needs before returning, whatever last_save_model_only says; nothing if it is there.

        Raises SaveError.
        """
        if not self.enable or self.load_only or step == 0:  # a run at step 0 starts again as it did
            return
        self._wait_out()
        if not self._is_saved(step):
            logger.info(f"Saving a full checkpoint at step {step}.")
            states, path = self._flattened_model_states_sd(), self._create_checkpoint_id(step)
            try:
                self.dcp_save(states, path, AsyncMode.DISABLED, enable_garbage_collection=True)
            except CheckpointException as error:
                self._settle(error, final=True)
        self._purge_stale_checkpoints()

    @torch.no_grad()
    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        """torchtitan's, with a writer of our own; it has no hook for one."""
        assert not to_hf, "flame.preflight.validate refuses last_save_in_hf"
        self.trainer.check_state()
        self.saving = checkpoint_id
        writer = Writer(checkpoint_id, self._facts(state_dict) if dist.get_rank() == 0 else {})
        if async_mode != AsyncMode.DISABLED:
            process = async_mode == AsyncMode.ASYNC_WITH_PINNED_MEM
            return dcp.async_save(
                state_dict,
                storage_writer=writer,
                process_group=self.pg,
                async_checkpointer_type=AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD,
                async_stager=self.stager,
            )
        dcp.save(state_dict, storage_writer=writer)
        if enable_garbage_collection:
            GarbageCollection.collect("GC collection invoked by checkpointer.")
        return None

    def close(self) -> None:
        self._wait_out()  # what closes now has ended already, well or not
        super().close()

    def _facts(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What the marker of a checkpoint says of it, besides its files."""
        return {
            **{name: getattr(self.trainer, name) for name in ("step", "tokens", "data_digest")},
            "resumable": TRAIN_STATE in state_dict,
            "ranks": dist.get_world_size(),
            "config": self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        return tomli.loads(to_toml(recorded(self.trainer.context.job_config)))

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        if self.every_seconds and self.enable and not self.load_only and not last_step:
            (due,) = self.consensus.max(
                time.monotonic() - self.last_save >= self.config.interval
            )  # by the clock of any rank
            if due:
                self.last_save = time.monotonic()
            return bool(due) or (curr_step == 1 and self.config.enable_first_step_checkpoint)
        return super()._should_save(curr_step, last_step)

    def _save_last_step(self, curr_step: int) -> None:
        if not self._is_saved(curr_step):  # at the end of the data it may be: a model alone must not take its place
            super()._save_last_step(curr_step)
        self._purge_stale_checkpoints()

    def _is_saved(self, step: int) -> bool:
        """Whether a checkpoint that can be resumed is there; all ranks get the answer of the first."""
        path = Path(self._create_checkpoint_id(step))
        return self.consensus.first(lambda: inspect_checkpoint(path).resumable)

    def _async_wait(self) -> None:
        try:
            super()._async_wait()
        except CheckpointException as error:
            self.save_future = None
            self._settle(error)

    def _wait_out(self) -> None:
        """Wait for an async save, if one is under way, whose failure is no reason not to save once more."""
        if getattr(self, "save_future", None) is None:  # torchtitan's has none without checkpoint.enable
            return
        try:
            self._async_wait()
        except SaveError as error:
            logger.error(str(error))

    def _settle(self, error: CheckpointException, final: bool = False) -> None:
        """Clear up after a save that failed on all ranks, and go on if that was asked for and another save follows."""
        found = [failure for failure, _ in error.failures.values()]
        if not all(isinstance(failure, OSError) for failure in found):
            raise error
        if dist.get_rank() == 0:
            remove_incomplete(Path(self.saving))
        message = f"{self.saving} could not be saved: {found[0]}"
        if final or self.config.on_save_failure == "stop":
            raise SaveError(f"{message}; what was saved before is as it was")
        logger.warning(f"{message}; training goes on (--checkpoint.on_save_failure continue)")

    def _purge_stale_checkpoints(self) -> None:
        if self.keep_latest_k == 0 or dist.get_rank() != 0:
            return
        every = self.config.keep_every
        try:
            old = complete_steps(self.folder)[: -self.keep_latest_k]
        except UserError as error:
            logger.warning(f"older checkpoints could not be deleted: {error}")
            return
        for step in old:
            path = Path(self._create_checkpoint_id(step))
            if step == 0 or (every and step % every == 0):  # step 0 is what the user began with
                continue
            try:
                self.purge_queue.put(str(mark_for_deletion(path)))
            except OSError as error:
                logger.warning(f"{path} could not be deleted: {error}")

    # -- starting -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load(self, step: int = -1) -> bool:
        """Start as the settings say; `step` is their load_step. Returns whether anything was loaded. Raises UserError.

        A checkpoint is proven before any of it is loaded; one that is damaged is named, and the newest before it that
        is not is taken, unless a step was asked for.
        """
        folder, context = Path(self.folder) if self.enable else Path(), self.trainer.context
        start, last_step = context.start, context.job_config.training.steps
        source, restored = "", []
        if start.mode == "resume":
            self._log_corrupted(folder)
            flag = f"--checkpoint.{'load_step' if start.steps == (self.config.load_step,) else 'folder'}"
            path = find_intact(self.consensus, [folder / f"step-{step}" for step in start.steps], flag)
            number = step_of(path)
            if number > 0:
                check_resumable(path, start.checkpoints[number], last_step)
            if self.sd_adapter is not None:  # of a model whose structure is known
                self.consensus.first(lambda: self.sd_adapter.check(flag, path, ties=number == 0))
            source, restored = str(path), self._resume(path, number)
            if number < last_step:
                self.consensus.first(lambda: self._archive(folder, number))
        elif self.enable:
            self.consensus.first(lambda: self._archive(folder))
            if start.mode == "init":
                source, restored = self.initial_load_path, self._load_initial()
                if (step := self.trainer.step) >= last_step:
                    raise UserError(f"--training.steps: found {last_step}, must be more than {source}'s {step}")
        if self.enable and self.keep_latest_k and not self.load_only and dist.get_rank() == 0:
            for path in pending_deletions(folder):
                self.purge_queue.put(str(path))
        self._say(start.mode, source, restored)
        return bool(source)

    def _log_corrupted(self, folder: Path) -> None:
        for step, status in self.trainer.context.start.checkpoints.items():
            if status.corruption and dist.get_rank() == 0:
                logger.warning(f"{folder / f'step-{step}'} is not complete and is not used: {status.corruption}")

    def _archive(self, folder: Path, after: int | None = None) -> None:
        """Move away the checkpoints after the step that is resumed; at a new start, the first save, cut short."""
        for step, status in self.trainer.context.start.checkpoints.items():
            keep = after is not None and (step <= after or status.unfinished)  # an unfinished one is overwritten
            if not (keep or self.load_only):
                path = folder / f"step-{step}"
                logger.warning(f"{path} is moved to {archive(path)}")

    def _resume(self, checkpoint: Path, step: int) -> list[str]:
        """Load a checkpoint of this job; returns the names of what was loaded."""
        if step == 0 or self.trainer.context.start.checkpoints[step].resumable:
            return self._load(checkpoint, model_only=step == 0)
        # The end of the job, of which the marker alone has what it counted.
        marker = self.consensus.first(lambda: read_marker(checkpoint))
        counted: dict[str, Any] = {name: marker[name] for name in ("tokens", "data_digest") if name in marker}
        self.trainer.load_state_dict({"step": step, **counted})
        return self._load(checkpoint, model_only=True)

    def _load(self, checkpoint: Path, model_only: bool, left_out: Sequence[str] = ()) -> list[str]:
        """Load a checkpoint of ours but for what is left out; returns the names of what was loaded."""
        wanted = {name: state for name, state in self.states.items() if name not in left_out}
        kept = [dict(group) for group in self._groups()]
        states = self.states[MODEL].state_dict() if model_only else self._flattened_model_states_sd(wanted)
        self.dcp_load(states, str(checkpoint), from_hf=False, from_quantized=False)
        for group, asked in zip(self._groups(), kept, strict=True):  # a checkpoint brings its own betas and the like
            group.update({name: value for name, value in asked.items() if name not in _OF_CHECKPOINT})
        GarbageCollection.collect("GC collection for checkpoint loading.")
        return [MODEL] if model_only else list(wanted)

    def _load_initial(self) -> list[str]:
        """Load what --checkpoint.initial_load_path names; returns the names of what was. Raises UserError."""
        if self.initial_load_in_hf:
            self.dcp_load(self._states_to_load(True), self.initial_load_path, from_hf=True, from_quantized=False)
            return [MODEL]
        checkpoint = find_intact(self.consensus, [Path(self.initial_load_path)], "--checkpoint.initial_load_path")
        return self._load(checkpoint, self.initial_load_model_only, self.exclude_from_loading)

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any) -> None:
        """torchtitan's; a checkpoint of another model is refused in one line."""
        try:
            super().dcp_load(state_dict, checkpoint_id, *args, **kwargs)
        except CheckpointException as error:
            failure, _ = next(iter(error.failures.values()))
            if not str(failure).startswith(_ANOTHER_MODEL):
                raise
            raise UserError(f"{checkpoint_id} does not fit this job: {str(failure).splitlines()[0]}") from None

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.states[OPTIMIZER] for group in optimizer.param_groups]

    def _say(self, mode: str, source: str, restored: list[str]) -> None:
        """Say, and keep for status.json, how the job starts; and what changed since the checkpoint it resumes."""
        trainer = self.trainer
        self.origin = {"mode": mode, "source": source or None, "step": trainer.step, "tokens": trainer.tokens}
        self.origin["restored"] = restored
        if self.config.load_step >= 0:
            self.origin["load_step"] = self.config.load_step
        if dist.get_rank() != 0:
            return
        origin = f" from {source}" if source else ""
        what = ", ".join(restored) or "nothing, the weights are random"
        logger.info(f"start: {mode}{origin}, step {trainer.step}, {trainer.tokens:,} tokens; restored: {what}")
        if mode == "resume" and self.exclude_from_loading:
            logger.info("--checkpoint.exclude_from_loading is for --checkpoint.initial_load_path: all was restored")
        if mode == "resume" and self.config.load_step not in (-1, trainer.step):
            logger.info(f"--checkpoint.load_step {self.config.load_step}: this job went back to it before, and goes on")
        if mode == "resume" or (mode == "init" and not self.initial_load_in_hf):
            marker = read_marker(Path(source))
            if not marker:
                logger.warning(f"{source} has no {MARKER}: no more than its names and sizes could be checked")
            changes = changed_settings(marker["config"], self._settings()) if "config" in marker else ()
            for change in changes if len(restored) > 1 else ():  # of a model alone no setting is taken over
                logger.info(f"changed since {Path(source).name}: {change}")
