"""torchtitan's Trainer with a step that is right in every layout, a provable data stream, and a run folder."""

import math
import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.train
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger

from flame.checkpoint.manager import CheckpointManager
from flame.config.parser import recorded, to_toml
from flame.data.document import Bad, allow_bad
from flame.data.ledger import digest_batch, roll
from flame.errors import NonFiniteError, UserError
from flame.runtime import stop
from flame.runtime.consensus import RankConsensus
from flame.runtime.run_folder import Run
from flame.training import nonfinite

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


class FlameTrainer(torchtitan.train.Trainer):
    """Differs from torchtitan's Trainer in what a step and a save do; see `train_step`."""

    def __init__(self, job_config: Any, signals: stop.Signals | None = None) -> None:
        torchtitan.train.CheckpointManager = CheckpointManager  # 0.2.2 has no hook for it
        super().__init__(job_config)
        if job_config.training.mixed_precision_param == "float32":
            self.maybe_enable_amp = nullcontext()  # 0.2.2 asks autocast for float32, which CPU refuses at every step
        training = job_config.training
        sequences = self.gradient_accumulation_steps * training.local_batch_size * self._batch_ranks()[1]
        self.step_tokens = sequences * training.seq_len  # of the whole job
        self.tokens = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.data_digest = ""
        self.resumed_at: int | None = None
        self.exhausted = False
        self.bad_rows: dict[str, int] = {}
        self.bad_rows_said: set[tuple[str, Bad]] = set()
        self.epochs: dict[str, int] | None = None  # whole ones of each source, as far as they were said
        self.last_save = time.monotonic()
        self.started = False
        self.stopped = ""  # why, once it is
        self.consensus = RankConsensus()
        self.signals = signals or stop.Signals(stop.note, stop.end_at_once)
        limit = training.max_wall_time
        self.deadline = stop.launched_at() + stop.seconds(limit) if limit else math.inf
        self.checkpointer.before_save = self._check_state
        if job_config.validation.enable:
            self.validator.stop_if_asked = self._stop_if_asked
        self.run = Run(job_config.job.dump_folder, writes=dist.get_rank() == 0)
        self.metrics_processor.run = self.run
        if job_config.optimizer.early_step_in_backward:
            logger.warning(
                "--optimizer.early_step_in_backward: gradients are not clipped nor checked; weights are, when saved"
            )

    # -- one step -----------------------------------------------------------------------------------------------------

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        """One optimizer step over the step's global batch.

        Replaces torchtitan's whole method, because what flame adds lies between its lines: the ranks agree on the
        batch (tokens, digest, end of data) before the first forward, on going on before each, and on finite losses and
        gradients before the update. A step that is not finished leaves no trace.
        """
        self.optimizers.zero_grad()
        if self.epochs is None:
            self.epochs = {name: int(epochs) for name, (_, epochs) in self._sum_counts().items()}
        lr = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        self._seed_step()
        position = self.dataloader.position()
        microbatches, exhausted = self._collect(data_iterator)
        losses: list[torch.Tensor] = []
        early = self.job_config.optimizer.early_step_in_backward  # each microbatch is an update then, which stays
        try:
            local_tokens, global_tokens, digest = self._agree(microbatches, exhausted)
            for input_dict, labels in microbatches:
                if not (losses and early):
                    self._stop_if_asked()
                inputs = {name: tensor.to(self.device) for name, tensor in input_dict.items()}
                loss = self.forward_backward_step(
                    input_dict=inputs, labels=labels.to(self.device), global_valid_tokens=global_tokens
                )
                losses.append(loss.detach())
        except (DataloaderExhaustedError, stop.Stopped):
            self.step -= 1  # the step was not done
            self.dataloader.rewind(position)  # what this rank did get of it is to come again, should the data go on
            raise

        loss = torch.stack(losses).sum()
        self.tokens += self.step_tokens
        self.data_digest = roll(self.data_digest, digest)
        self.metrics_processor.steps_since_last_log += 1
        bad = nonfinite.find_bad_step(loss, self.model_parts, self.consensus)
        grad_norm = math.nan if bad else self._clip()
        if not bad and not math.isfinite(grad_norm):
            bad = "the norm of finite gradients"
        self.checkpointer.maybe_wait_for_staging()
        if bad:
            try:
                self._skip(bad)
            except NonFiniteError:
                self._log(loss, local_tokens, global_tokens, grad_norm, lr)  # its data can then be shown and compared
                raise
        else:
            self.skipped_in_a_row = 0
            self.optimizers.step()
        self.lr_schedulers.step()
        if self.resumed_at and self.step == self.resumed_at + 1:  # torchtitan does it after step 1 alone
            timeout = timedelta(seconds=self.job_config.comm.train_timeout_seconds)
            dist_utils.set_pg_timeouts(timeout=timeout, parallel_dims=self.parallel_dims)
        if self.metrics_processor.should_log(self.step):
            self._log(loss, local_tokens, global_tokens, grad_norm, lr)

    def forward_backward_step(
        self, *, input_dict: dict[str, torch.Tensor], labels: torch.Tensor, global_valid_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Backward of (sum of the local loss / global valid tokens); returns that quotient.

        Mends torchtitan 0.2.2 under DDP: the loss is already divided by the global tokens, and DDP then averages over
        its replicas, which makes gradients too small by their number.
        """
        dims = self.parallel_dims
        if dims.pp_enabled:
            self.loss_fn.scale = 1 / global_valid_tokens
            loss = super().forward_backward_step(
                input_dict=input_dict, labels=labels, global_valid_tokens=torch.ones_like(global_valid_tokens)
            )
            return loss if self.pp_has_last_stage else torch.zeros_like(loss)
        averaged = dims.dp_replicate if dims.dp_replicate_enabled and not dims.fsdp_enabled else 1
        loss = super().forward_backward_step(
            input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens / averaged
        )
        return loss / averaged

    def post_dataloading_process(self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor) -> Any:
        """Hand the labels to the model, whose head returns the loss without ever holding all logits."""
        extra_inputs, extra_kwargs = dict(input_dict), {"labels": labels}
        inputs = extra_inputs.pop("input")
        if self.parallel_dims.pp_enabled:  # every stage needs them, cut into microbatches
            extra_kwargs |= {"positions": extra_inputs["positions"]} if "positions" in extra_inputs else {}
            extra_inputs = {}
        return inputs, labels, extra_inputs, extra_kwargs

    def _seed_step(self) -> None:
        # Dropout draws from (seed, step, rank), so that a resumed run draws what an uninterrupted one does. Ranks that
        # share a sequence draw alike, as they drop out of the same embeddings, and of parts of the same sums.
        seed, (rank, ranks) = self.job_config.debug.seed or 0, self._batch_ranks()
        if self.parallel_dims.pp_enabled:
            rank += ranks * self.parallel_dims.get_mesh("pp").get_local_rank()
        torch.manual_seed((seed * 1_000_003 + self.step) * 65_537 + rank)

    def _collect(self, data_iterator: Iterator[Batch]) -> tuple[list[Batch], bool]:
        microbatches: list[Batch] = []
        try:
            for _ in range(self.gradient_accumulation_steps):
                microbatches.append(next(data_iterator))
        except DataloaderExhaustedError:
            return microbatches, True
        return microbatches, False

    def _agree(self, microbatches: list[Batch], exhausted: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Local and global valid tokens and the global data digest; all ranks stop together at the end of data."""
        rank, ranks = self._batch_ranks()
        valid = digest = row = 0
        for input_dict, labels in microbatches:
            indices = [(row + i) * ranks + rank for i in range(len(labels))]
            digest += digest_batch(input_dict["input"].numpy(), labels.numpy(), indices)
            valid += int((labels != IGNORE_INDEX).sum())
            row += len(labels)
        rows = self.dataloader.skipped()
        counts = [count for pair in rows.values() for count in pair]
        local = torch.tensor([valid, _wrap(digest), exhausted, *counts], device=self.device)
        agreed = local.clone()
        if self.parallel_dims.dp_enabled:
            dist.all_reduce(agreed, group=self.parallel_dims.get_mesh("batch").get_group())
        total, digest, exhausted_ranks, *counts = agreed.tolist()
        self._check_rows({name: (counts[2 * i], counts[2 * i + 1]) for i, name in enumerate(rows)})
        if exhausted_ranks:
            raise DataloaderExhaustedError
        if self.checkpointer.enable and self.checkpointer.every_seconds:
            due = time.monotonic() - self.last_save >= self.job_config.checkpoint.interval
            self.checkpointer.due = bool(self.consensus.max(due)[0])
            if self.checkpointer.due:
                self.last_save = time.monotonic()
        return local[0].float(), torch.tensor(float(total), device=self.device), digest

    def _check_rows(self, rows: dict[str, tuple[int, int]]) -> None:
        """Say where new bad rows are, and stop, on all ranks alike, at too many; rows: {source: (bad, read)}."""
        bad_rows = {name: bad for name, (bad, _) in rows.items()}
        if bad_rows == self.bad_rows or not any(bad_rows.values()):
            return
        self.bad_rows = bad_rows
        ranks: list[Any] = [self.dataloader.noted()]
        if self.parallel_dims.dp_enabled:
            ranks *= self._batch_ranks()[1]
            dist.all_gather_object(ranks, ranks[0], group=self.parallel_dims.get_mesh("batch").get_group())
        noted = [(name, row) for rank in ranks for name, found in rank.items() for row in found]
        for name, row in noted:
            if self.run.writes and (name, row) not in self.bad_rows_said:
                logger.warning(f"source {name}: {row.place} is skipped: {row.reason}")
        self.bad_rows_said.update(noted)
        limit = self.job_config.data.max_bad_rows
        for name, (bad, read) in rows.items():
            if bad > allow_bad(limit, read):
                example = next((f", such as {row.place} ({row.reason})" for n, row in noted if n == name), "")
                raise UserError(
                    f"--data.max_bad_rows: found {bad} bad rows among {read} of source {name}{example}, "
                    f"must be at most {allow_bad(limit, read):g} (set to {limit:g})"
                )

    # -- NaN and infinity ---------------------------------------------------------------------------------------------

    def _clip(self) -> float:
        """Clip the gradients; returns the norm that they had."""
        return dist_utils.clip_grad_norm_(
            [p for part in self.model_parts for p in part.parameters()],
            self.job_config.training.max_norm,
            foreach=True,
            pp_mesh=self.parallel_dims.get_optional_mesh("pp"),
            ep_enabled=self.parallel_dims.ep_enabled,
        ).item()

    def _skip(self, bad: str) -> None:
        """Count a step whose update is skipped, all ranks alike. Raises NonFiniteError if it may not be."""
        training, when = self.job_config.training, "before the update"
        self.skipped_in_a_row += 1
        if self.job_config.optimizer.early_step_in_backward:
            when, policy = "after the update", "--optimizer.early_step_in_backward updates before it can be known"
        elif not training.skip_nan_inf:
            policy = "--training.skip_nan_inf skips such steps"
        elif self.skipped_in_a_row > training.max_skipped_steps:
            policy = (
                f"as were the {training.max_skipped_steps} steps before, all that --training.max_skipped_steps allows"
            )
        else:
            self.skipped_steps += 1
            for name, buffer in (pair for part in self.model_parts for pair in part.named_buffers()):
                if name.endswith("tokens_per_expert"):  # torchtitan's routers count, and only an update counts anew
                    buffer.zero_()
            logger.warning(f"step {self.step}: not finite: {bad}; the update is skipped ({self.skipped_steps} so far)")
            return
        raise NonFiniteError(
            f"step {self.step}: not finite: {bad}; stopped {when}, and nothing was saved ({policy}); "
            f"{self._show_data()}"
        )

    def _check_state(self) -> None:
        """Refuse, all ranks alike, to save weights or an optimizer that are not finite. Raises NonFiniteError."""
        if bad := nonfinite.find_bad_state(self.model_parts, self.optimizers, self.consensus):
            raise NonFiniteError(
                f"step {self.step}: not finite after it: {bad}; it is not saved, what was saved before is kept; "
                f"{self._show_data()}"
            )

    def _show_data(self) -> str:
        folder = shlex.quote(str(self.run.folder))
        return f"its data, of digest {self.data_digest}: python -m flame.data show {folder} --step {self.step}"

    def _log(
        self, loss: torch.Tensor, local_tokens: torch.Tensor, global_tokens: torch.Tensor, grad_norm: float, lr: float
    ) -> None:
        if self.parallel_dims.pp_enabled:  # the last stage has it, the others zero
            dist.all_reduce(loss, group=self.parallel_dims.get_mesh("pp").get_group())
        mean_loss = max_loss = loss.item()
        waited = sum(self.metrics_processor.data_loading_times)
        if self.parallel_dims.dp_cp_enabled:
            mesh = self.parallel_dims.get_optional_mesh("loss")
            mean_loss = dist_utils.dist_sum(loss, mesh)
            context = self.parallel_dims.get_optional_mesh("cp")
            of_rows = loss if context is None else torch.tensor(dist_utils.dist_sum(loss, context), device=self.device)
            max_loss = dist_utils.dist_max(of_rows * global_tokens / local_tokens, mesh)
            waited = dist_utils.dist_max(torch.tensor(waited, device=self.device), mesh)
        extra = {"lr": lr, "tokens": self.tokens, "data_digest": self.data_digest}
        extra["data/wait_seconds"] = waited  # since the last log, of the rank that waited longest
        if self.job_config.training.skip_nan_inf:
            extra["optimizer/skipped_step"] = self.skipped_steps
        self.metrics_processor.log(self.step, mean_loss, max_loss, grad_norm, {**extra, **self._count_sources()})
        self.run.set_status("running", step=self.step, tokens=self.tokens)

    def _sum_counts(self) -> dict[str, tuple[float, float]]:
        """{source: (tokens, epochs)} of all ranks."""
        counts = self.dataloader.counts()
        flat = torch.tensor([value for pair in counts.values() for value in pair], dtype=torch.float64).to(self.device)
        if self.parallel_dims.dp_enabled:
            dist.all_reduce(flat, group=self.parallel_dims.get_mesh("batch").get_group())
        return dict(zip(counts, flat.view(-1, 2).tolist(), strict=True))

    def _count_sources(self) -> dict[str, float]:
        record: dict[str, float] = {}
        for name, (tokens, epoch) in self._sum_counts().items():
            record |= {f"data/{name}/tokens": round(tokens), f"data/{name}/epoch": epoch}
            record[f"data/{name}/skipped"] = self.bad_rows.get(name, 0)
            if self.run.writes and self.job_config.data.epochs == 0:
                self._say_epoch(name, int(epoch))
        return record

    def _say_epoch(self, name: str, done: int) -> None:
        assert self.epochs is not None
        if done > self.epochs[name]:
            logger.warning(f"source {name} begins epoch {done + 1}: all of it was read (--data.epochs sets an end)")
            self.epochs[name] = done

    def _batch_ranks(self) -> tuple[int, int]:
        if not self.parallel_dims.dp_enabled:
            return 0, 1
        mesh = self.parallel_dims.get_mesh("batch")
        return mesh.get_local_rank(), mesh.size()

    # -- a run --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Write the run folder's records, once the run is known to go on: a refused one must leave them as they are."""
        self.started = True
        if self.step < self.job_config.training.steps:
            self.lr_schedulers.apply()
        self.consensus.first(self._record)

    def _record(self) -> None:
        trains = self.step < self.job_config.training.steps  # else what was recorded stays
        if trains:
            self.run.rewind(self.step)
            self.run.start(to_toml(recorded(self.job_config)), self._device())
        self.run.set_status("running", start=self.checkpointer.origin)
        if trains or not (self.run.folder / "model").exists():
            self.model_parts[0].save_assets(self.run.folder / "model", self.tokenizer.hf)

    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:
        """torchtitan's generator, which it asks for as soon as a checkpoint is loaded."""
        self.start()
        return super().batch_generator(data_iterable)

    def _stop_if_asked(self) -> None:
        """Raise Stopped, on all ranks alike, if one of them was sent a signal or the first one's time is over."""
        late = dist.get_rank() == 0 and time.monotonic() >= self.deadline
        (asked,) = self.consensus.max(stop.OUT_OF_TIME if late else self.signals.asked)
        if asked:
            raise stop.Stopped(asked)

    def train(self) -> None:
        """Train to the last step, the end of data or a stop, all ranks alike, and leave a status behind."""
        steps = self.job_config.training.steps
        try:
            self._stop_if_asked()
            super().train()
        except stop.Stopped as stopped:
            self.stopped = str(stopped)
            if self.started:
                self.optimizers.zero_grad()  # what a step that was cut short has left takes memory
                self.checkpointer.save_full(self.step)
                self.run.set_status("preempted", step=self.step, tokens=self.tokens, reason=self.stopped)
            return
        if self.step < steps:
            if self.step == 0:
                raise UserError(
                    f"--data.epochs: {self.job_config.data.epochs} of the data does not fill one step; fewer "
                    f"--data.lanes than {self.job_config.data.lanes}, a shorter --training.seq_len or more epochs may"
                )
            self.exhausted = True
            if self.step != self.resumed_at:
                self.checkpointer.save(self.step, last_step=True)
            self.run.set_status("data_exhausted", step=self.step, tokens=self.tokens)
            return
        if self.resumed_at is not None and self.resumed_at >= steps:
            logger.info(f"This job is complete: step {self.step} of {steps} is done; nothing was trained.")
        self.run.set_status("completed", step=self.step, tokens=self.tokens)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "skipped_steps": self.skipped_steps,
            "data_digest": self.data_digest,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)
        self.resumed_at = self.step

    def _device(self) -> dict[str, Any]:
        monitor = self.metrics_processor.device_memory_monitor
        return {"name": monitor.device_name, "memory_gib": monitor.device_capacity_gib, "ranks": dist.get_world_size()}


def _wrap(digest: int) -> int:
    return (digest + 2**63) % 2**64 - 2**63  # signed 64 bit, as torch adds it across ranks
