"""torchtitan's CheckpointManager, which saves a whole checkpoint or none and loads a verified one or none."""

import math
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

from flame.checkpoint import commit
from flame.checkpoint.reader import load
from flame.checkpoint.start import StartPlan, changed_settings, check_resumable, step_of
from flame.checkpoint.verification import find_intact
from flame.checkpoint.writer import Writer
from flame.config.parser import recorded, to_toml
from flame.config.schema import JobConfig
from flame.errors import SaveError, UserError
from flame.runtime.consensus import RankConsensus

_FROM_CHECKPOINT = ("params", "lr", "initial_lr")  # of an optimizer group; lr_schedule writes the rates anew
_ANOTHER_MODEL = ("Size mismatch", "Missing key")  # how DCP says that tensors are not those of the model


class Context(Protocol):
    """What the manager needs of flame.training.context."""

    job_config: JobConfig
    consensus: RankConsensus
    start: StartPlan


class TrainState(Protocol):
    """What the manager needs of the trainer, which it saves and loads under "train_state"."""

    context: Any  # a Context
    step: int
    tokens: int
    data_digest: str

    def check_state(self) -> None:
        """Raises, on all ranks, if the state may not be saved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class CheckpointManager(TitanCheckpointManager):
    """Saves when a save is due, starts as --checkpoint.start asks, and keeps the newest k checkpoints.

    Workarounds for torchtitan 0.2.2 (components/checkpoint.py): rotation counts half-written folders and exports; an
    existing but empty folder hides `initial_load_path`, and the run trains from random weights; a corrupted checkpoint
    is loaded; a resumed run takes betas, eps and weight decay from the checkpoint, whatever the settings are; the last
    save is not rotated; `close` does not wait for an async save.
    """

    folder: str

    def __init__(self, *args: Any, checkpoint_config: Any, **kwargs: Any) -> None:
        super().__init__(*args, checkpoint_config=checkpoint_config, **kwargs)
        self.config = checkpoint_config
        self.trainer: TrainState = self.states[TRAIN_STATE]
        self.context: Context = self.trainer.context
        self.consensus = self.context.consensus
        self.every_seconds = checkpoint_config.interval_type == "seconds"
        self.last_save = time.monotonic()  # for intervals in seconds
        self.kept: set[Path] = set()  # that rotation would delete, but which hold a user's files
        self.due = False  # by the clock of any rank; the trainer asks all of them in every step
        self.saving = ""  # the checkpoint that was begun last
        self.replaced_after: float = math.inf  # the step after which checkpoints are replaced
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
        """torchtitan's method with our writer, for which it has no hook."""
        assert not to_hf, "flame.preflight.validate rejects last_save_in_hf"
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
        self._wait_out()
        super().close()

    def _facts(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What the commit marker records besides the files."""
        return {
            **{name: getattr(self.trainer, name) for name in ("step", "tokens", "data_digest")},
            "resumable": TRAIN_STATE in state_dict,
            "ranks": dist.get_world_size(),
            "config": self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        return tomli.loads(to_toml(recorded(self.context.job_config)))

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        if self.every_seconds and self.enable and not self.load_only and not last_step:
            if self.due:
                self.last_save = time.monotonic()
            return self.due or (curr_step == 1 and self.config.enable_first_step_checkpoint)
        return super()._should_save(curr_step, last_step)

    def is_due(self) -> bool:
        """Whether a save is due by the clock of this rank."""
        return self.every_seconds and time.monotonic() - self.last_save >= self.config.interval

    def _save_last_step(self, curr_step: int) -> None:
        if not self._is_saved(curr_step):  # the end of the data may have saved it: a model alone must not replace it
            super()._save_last_step(curr_step)
        self._purge_stale_checkpoints()

    def _is_saved(self, step: int) -> bool:
        """Whether a checkpoint that can be resumed is there, as rank 0 sees it."""
        path = Path(self._create_checkpoint_id(step))
        return self.consensus.first(lambda: commit.inspect_checkpoint(path).resumable)

    def _async_wait(self) -> None:
        try:
            super()._async_wait()
        except CheckpointException as error:
            self.save_future = None
            self._settle(error)

    def _wait_out(self) -> None:
        """Wait for an async save if one is under way; its failure must not prevent the next save."""
        if getattr(self, "save_future", None) is None:  # not set without checkpoint.enable
            return
        try:
            self._async_wait()
        except SaveError as error:
            logger.error(str(error))

    def _settle(self, error: CheckpointException, final: bool = False) -> None:
        """Clean up after a save that failed on all ranks. Raises SaveError unless the run may continue without it."""
        failures = [failure for failure, _ in error.failures.values()]
        if not all(isinstance(failure, OSError) for failure in failures):
            raise error
        if dist.get_rank() == 0:
            commit.remove_incomplete(Path(self.saving))
        message = f"{self.saving} could not be saved: {failures[0]}"
        if final or self.config.on_save_failure == "stop":
            raise SaveError(f"{message}; what was saved before is as it was")
        logger.warning(f"{message}; training goes on (--checkpoint.on_save_failure continue)")

    def _purge_stale_checkpoints(self) -> None:
        if self.keep_latest_k == 0 or dist.get_rank() != 0:
            return
        every = self.config.keep_every
        try:
            old = commit.complete_steps(self.folder)[: -self.keep_latest_k]
        except UserError as error:
            logger.warning(f"older checkpoints could not be deleted: {error}")
            return
        for step in old:
            path = Path(self._create_checkpoint_id(step))
            if step == 0 or (every and step % every == 0):  # step 0 is what the user began with
                continue
            try:
                if added := commit.find_added(path):
                    if path not in self.kept:
                        logger.warning(f"{path} is kept: it holds a file that is not the checkpoint's, {added[0]}")
                    self.kept.add(path)
                    continue
                self.purge_queue.put(str(commit.mark_for_deletion(path)))
            except (OSError, ValueError) as error:
                logger.warning(f"{path} could not be deleted: {error}")

    # -- starting -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load(self, step: int = -1) -> bool:
        """Start as `context.start` says; returns whether anything was loaded. Raises UserError.

        A checkpoint is verified before any of it is loaded. A corrupted one is logged and the next older one is tried,
        unless a step was asked for.
        """
        folder = Path(self.folder) if self.enable else Path()
        start, last_step = self.context.start, self.context.job_config.training.steps
        source, restored = "", []
        if start.mode == "resume":
            self._log_corrupted(folder)
            flag = f"--checkpoint.{'load_step' if start.steps == (self.config.load_step,) else 'folder'}"
            path = find_intact(self.consensus, [folder / f"step-{step}" for step in start.steps], flag)
            number = step_of(path)
            if number > 0:
                check_resumable(path, start.checkpoints[number], last_step)
            if self.sd_adapter is not None:  # torchtitan's own models may have none
                self.consensus.first(lambda: self.sd_adapter.check(flag, path, ties=number == 0))
            source, restored = str(path), self._resume(path, number)
            self.replaced_after = number if number < last_step else math.inf
        elif self.enable:
            self.replaced_after = -1
            if start.mode == "init":
                source, restored = self.initial_load_path, self._load_initial()
                if (step := self.trainer.step) >= last_step:
                    raise UserError("--training.steps", last_step, f"more than the {step} of {source}")
        self._log_start(start.mode, source, restored)
        return bool(source)

    def _log_corrupted(self, folder: Path) -> None:
        for step, status in self.context.start.checkpoints.items():
            if status.corruption and dist.get_rank() == 0:
                logger.warning(f"{folder / f'step-{step}'} is not complete and is not used: {status.corruption}")

    def archive_replaced(self) -> None:
        """Archive the checkpoints after the one that was loaded; at a new start, an interrupted first save.

        Rank 0 calls it, once nothing can reject the start any more. Raises OSError.
        """
        if not self.enable or self.load_only:
            return
        for step, status in self.context.start.checkpoints.items():
            path = Path(self.folder, f"step-{step}")
            resumes = self.replaced_after >= 0  # and overwrites what has not even metadata
            overwritten = resumes and status.unfinished and not (path / commit.METADATA).exists()
            if step > self.replaced_after and not overwritten:
                logger.warning(f"{path} is moved to {commit.archive(path)}")
        if self.keep_latest_k:
            for path in commit.pending_deletions(Path(self.folder)):
                self.purge_queue.put(str(path))

    def _resume(self, checkpoint: Path, step: int) -> list[str]:
        """Load a checkpoint of this job; returns the names of what was loaded."""
        if step == 0 or self.context.start.checkpoints[step].resumable:
            return self._load(checkpoint, model_only=step == 0)
        # A model alone, saved at the end of the job: the marker has the counters.
        marker = self.consensus.first(lambda: commit.read_marker(checkpoint))
        counted: dict[str, Any] = {name: marker[name] for name in ("tokens", "data_digest") if name in marker}
        self.trainer.load_state_dict({"step": step, **counted})
        return self._load(checkpoint, model_only=True)

    def _load(self, checkpoint: Path, model_only: bool, left_out: Sequence[str] = ()) -> list[str]:
        """Load a DCP checkpoint except what is left out; returns the names of what was loaded."""
        wanted = {name: state for name, state in self.states.items() if name not in left_out}
        kept = [dict(group) for group in self._groups()]
        states = self.states[MODEL].state_dict() if model_only else self._flattened_model_states_sd(wanted)
        self.dcp_load(states, str(checkpoint), from_hf=False, from_quantized=False)
        for group, asked in zip(self._groups(), kept, strict=True):  # DCP overwrote betas and the like
            group.update({name: value for name, value in asked.items() if name not in _FROM_CHECKPOINT})
        GarbageCollection.collect("GC collection for checkpoint loading.")
        return [MODEL] if model_only else list(wanted)

    def _load_initial(self) -> list[str]:
        """Load what --checkpoint.initial_load_path names; returns the names of what was. Raises UserError."""
        if self.initial_load_in_hf:
            self.dcp_load(self._states_to_load(True), self.initial_load_path, from_hf=True, from_quantized=False)
            return [MODEL]
        checkpoint = find_intact(self.consensus, [Path(self.initial_load_path)], "--checkpoint.initial_load_path")
        return self._load(checkpoint, self.initial_load_model_only, self.exclude_from_loading)

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """torchtitan's method with our reader. Raises UserError for the checkpoint of another model, or of code."""
        try:
            if from_hf:
                super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
            else:
                load(state_dict, Path(checkpoint_id))
                self.states[MODEL].load_state_dict(state_dict)
        except CheckpointException as error:
            failure, _ = next(iter(error.failures.values()))
            if not str(failure).startswith(_ANOTHER_MODEL):
                raise
            raise UserError(checkpoint_id, str(failure).splitlines()[0], "a checkpoint of this model") from None

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.states[OPTIMIZER] for group in optimizer.param_groups]

    def _log_start(self, mode: str, source: str, restored: list[str]) -> None:
        """Log how the job starts, which status.json keeps, and which settings changed since the checkpoint."""
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
            logger.info(f"--checkpoint.load_step {self.config.load_step}: the job went back to it earlier")
        if mode == "resume" or (mode == "init" and not self.initial_load_in_hf):
            marker = commit.read_marker(Path(source))
            if not marker:
                logger.warning(f"{source} has no {commit.MARKER}: only names and sizes were checked")
            changes = changed_settings(marker["config"], self._settings()) if "config" in marker else ()
            for change in changes if len(restored) > 1 else ():  # a model alone brings no settings
                logger.info(f"changed since {Path(source).name}: {change}")
