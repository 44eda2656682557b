"""torchtitan's Trainer with a step that is right in every layout, a provable data stream, and a run folder."""

import math
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
import torchtitan.train
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger
from torchtitan.tools.profiling import maybe_enable_memory_snapshot, maybe_enable_profiling

from flame.checkpoint.manager import CheckpointManager
from flame.config.parser import recorded, to_toml
from flame.config.paths import command
from flame.config.schema import JobConfig
from flame.data.ledger import roll
from flame.data.loader import Position
from flame.errors import NonFiniteError, UserError
from flame.parallel.apply import FSDPDims
from flame.parallel.layout import uses_fsdp
from flame.runtime import stop
from flame.runtime.consensus import naming_interface
from flame.runtime.device import upload
from flame.runtime.environment import describe_environment
from flame.runtime.run_folder import to_json
from flame.training import nonfinite
from flame.training.context import RunContext
from flame.training.data_accounting import DataAccounting
from flame.training.gradients import Gradients
from flame.training.metrics import advise_rows
from flame.training.outcome import Agreement
from flame.training.pipeline import Pipeline

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


class StepData(NamedTuple):
    """What a rank has of a step: its microbatches, their valid tokens and digest, and whether its data ended."""

    microbatches: list[Batch]
    valid_tokens: int
    digest: int
    exhausted: bool


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a rank in a step: 64 bits, as torch takes no more. The primes keep seeds, steps and ranks apart."""
    return ((seed * 1_000_003 + step) * 65_537 + rank) % 2**64


class FlameTrainer(torchtitan.train.Trainer):
    """Differs from torchtitan's Trainer in its loop, its step (`train_step`) and what a save does."""

    def __init__(self, job_config: JobConfig, context: RunContext) -> None:
        self.context, self.run = context, context.run
        use_our_checkpoint_manager()
        super().__init__(job_config)
        self.tokenizer.use(context.consensus.first(lambda: self.tokenizer.engine))
        training, (_, dp_degree) = job_config.training, self._batch_rank()
        sequences = self.gradient_accumulation_steps * training.local_batch_size * dp_degree
        self.step_tokens = sequences * training.seq_len  # of the whole job
        self.tokens = 0
        self.data_digest = ""
        self.resumed_at: int | None = None
        self.exhausted = False
        self.started = False
        self.asked = 0  # what asked a rank to stop, as all ranks know after each step
        self.stopped = ""  # the reason, once the run is stopped
        in_backward = job_config.optimizer.early_step_in_backward
        self.skips = nonfinite.SkippedSteps(training, updates_in_backward=in_backward)
        batch_mesh = self.parallel_dims.get_mesh("batch") if self.parallel_dims.dp_enabled else None
        self.accounting = DataAccounting(self.dataloader, batch_mesh, self.device, context)
        self.gradients = Gradients(self.model_parts, self.parallel_dims.get_optional_mesh("pp"), self.device)
        offloaded = training.enable_cpu_offload  # the update is the CPU's, and what it may not do is on the device
        self.updates_unread = not in_backward and not offloaded and can_skip_on_device(self.optimizers)
        self.pipeline: Pipeline | None = None
        if self.parallel_dims.pp_enabled:
            self.pipeline = Pipeline(self.pp_schedule, self.pp_has_first_stage, self.pp_has_last_stage, self.loss_fn)
        if in_backward:
            logger.warning("--optimizer.early_step_in_backward: gradients are neither clipped nor checked for NaN")

    def init_distributed(self) -> ParallelDims:
        with naming_interface():
            dims = super().init_distributed()
            _ = self.context.consensus  # a collective: made here, where all ranks are
        return FSDPDims(**vars(dims)) if uses_fsdp(self.job_config, dims.world_size) else dims

    # -- a run --------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to the last step, the end of the data or a stop, on all ranks alike, and leave a status."""
        steps = self.job_config.training.steps
        try:
            self.context.raise_if_stopped()
            self.checkpointer.load(self.job_config.checkpoint.load_step)
            self.start()
            self._train_steps(steps)
        except stop.Stopped as stopped:
            self.stopped = str(stopped)
            if self.started:
                self.optimizers.zero_grad()  # frees what an interrupted step left
                self.checkpointer.save_full(self.step)
                self.run.set_status("preempted", step=self.step, tokens=self.tokens, reason=self.stopped)
            return
        if self.step == 0 < steps:
            data = self.job_config.data
            found = f"{data.epochs}, and the data does not fill one step"
            hint = f"use fewer --data.lanes than {data.lanes}, a shorter --training.seq_len or more epochs"
            if bad := next((row for rows in self.dataloader.noted().values() for row in rows), None):
                hint += f"; rows are bad, such as {bad.place} ({bad.reason})"
            raise UserError("--data.epochs", found, hint=hint)
        if self.step < steps:
            self.exhausted = True
            if self.step != self.resumed_at:
                self.checkpointer.save(self.step, last_step=True)
            self.run.set_status("data_exhausted", step=self.step, tokens=self.tokens)
            return
        if self.resumed_at is not None and self.resumed_at >= steps:
            logger.info(self.run.describe_complete(self.step, steps))
        self.run.set_status("completed", step=self.step, tokens=self.tokens)

    def start(self) -> None:
        """Begin the run folder's records, after the checkpoint is loaded: a rejected run leaves them as they are."""
        if self.step < self.job_config.training.steps:
            before, today = self.lr_schedulers.apply()
            if self.resumed_at and self.run.writes and not math.isclose(before, today, rel_tol=1e-6):
                rates = f"{before:.2e} by the settings of its checkpoint, {today:.2e} by today's"
                logger.warning(f"learning rate at step {self.step + 1}: {rates} (docs/checkpoints.md, Extending a run)")
        self.context.consensus.first(self._record)
        self.started = True
        if self.step < self.job_config.training.steps:
            self.metrics_processor.open(self.step)
            self._advise()

    def _advise(self) -> None:
        """Log it if microbatches are too small for the GPU."""
        training, layout, metrics = self.job_config.training, self.job_config.parallelism, self.metrics_processor
        if metrics.peak_flops is None:
            return
        rows = layout.pipeline_parallel_microbatch_size if self.parallel_dims.pp_enabled else training.local_batch_size
        own_flops = metrics.num_flops_per_token / self.parallel_dims.non_data_parallel_size
        blocks = sum(len(part.layers) for part in self.model_parts)
        if advice := advise_rows(rows, training.seq_len, own_flops, blocks, metrics.peak_flops):
            logger.info(advice)

    def _record(self) -> None:
        trains = self.step < self.job_config.training.steps  # else the records of the finished run stay
        files: dict[str, str | bytes] = {}
        if trains:
            monitor = self.metrics_processor.device_memory_monitor
            device = {"name": monitor.device_name, "memory_gib": monitor.device_capacity_gib}
            environment = describe_environment({**device, "ranks": dist.get_world_size()})
            files |= self.run.rewound(self.step)
            files |= {"environment.json": to_json(environment), "config.toml": to_toml(recorded(self.job_config))}
        if trains or not (self.run.folder / "model").exists():
            files |= self.run.capture(lambda folder: self.model_parts[0].save_assets(folder, self.tokenizer.hf))
        with self.run.begin(files, step=self.step, tokens=self.tokens, start=self.checkpointer.origin):
            self.checkpointer.archive_replaced()

    def _train_steps(self, last: int) -> None:
        """torchtitan 0.2.2's loop, which loads the checkpoint itself and sleeps 2 s at its end.

        It shortens the timeout of collectives after step 1 alone; a resumed run needs it after its first step too.
        """
        config, first = self.job_config, self.step + 1
        observed = {"global_step": self.step, "base_folder": config.job.dump_folder}
        self.accounting.begin()
        with (
            maybe_enable_profiling(config.profiling, **observed) as profiler,
            maybe_enable_memory_snapshot(config.profiling, **observed) as memory_profiler,
        ):
            batches = self.batch_generator(self.dataloader)
            if self.device.type != "cpu" or config.compile.enable:
                logger.info(f"step {first}: compiling kernels, which may take minutes")
            while self.step < last:
                self.step += 1
                self.gc_handler.run(self.step)
                try:
                    self.train_step(batches)
                except DataloaderExhaustedError:
                    logger.warning("The data ended; the last step was cancelled.")
                    return
                if self.asked and self.step < last:
                    raise stop.Stopped(self.asked)
                if self.step == first:
                    timeout = timedelta(seconds=config.comm.train_timeout_seconds)
                    dist_utils.set_pg_timeouts(timeout=timeout, parallel_dims=self.parallel_dims)
                    if seconds := compile_seconds():
                        logger.info(f"step {first}: torch.compile took {seconds:.0f} s (--compile.enable)")
                self.checkpointer.save(self.step, last_step=self.step == last)
                if config.validation.enable and self.validator.should_validate(self.step):
                    self.validator.validate(self.model_parts, self.step)
                for each in filter(None, (profiler, memory_profiler)):
                    each.step()

    # -- one step -----------------------------------------------------------------------------------------------------

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        """One optimizer step over the step's global batch.

        Replaces torchtitan's method, because what flame adds lies between its lines: the ranks sum the tokens of the
        batch before the first forward, and agree behind the last backward on whether there may be an update: all had
        data, and losses and gradients are finite. The host waits once, for this; an optimizer that can skip the update
        on the device has it by then. A cancelled step leaves no trace.
        """
        self.optimizers.zero_grad()
        self._seed()
        lr = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        position = self.dataloader.position()
        data = self._collect(data_iterator)
        sums = self.accounting.sum_step(data.valid_tokens, data.digest)
        if self._must_end_now(data.exhausted):
            self.accounting.read_step(sums.tolist())
            self._cancel(position)
        missing = self.gradient_accumulation_steps - len(data.microbatches)  # others may have theirs
        loss = self._run_microbatches(data.microbatches + [self.dataloader.blank()] * missing, sums[0])
        norm = self.gradients.norm()
        asked, due = self.context.find_request(), self.checkpointer.is_due()
        agreement = Agreement(loss, norm, sums, exhausted=data.exhausted, asked=asked, due=due)
        self.checkpointer.maybe_wait_for_staging()
        if self.updates_unread:
            for optimizer in self.optimizers:
                optimizer.found_inf = agreement.unfit  # it then leaves weights and its state as they are
            self._update(norm)
        outcome = agreement.wait()
        global_tokens, digest = self.accounting.read_step(outcome.sums)  # the data's last rows may be bad ones
        if outcome.exhausted:
            self._cancel(position)
        self.asked, self.checkpointer.due = outcome.asked, outcome.due
        self.tokens += self.step_tokens
        self.data_digest = roll(self.data_digest, digest)
        self.metrics_processor.steps_since_last_log += 1
        grad_norm = math.nan if outcome.bad else outcome.norm
        try:
            if outcome.bad:
                bad = nonfinite.describe_step(loss, self.model_parts, self.context.consensus)
                self.skips.skip(self.step, bad, self.model_parts, self._show_data())
            else:
                self.skips.in_a_row = 0
                if not self.updates_unread:
                    self._update(norm)
        except NonFiniteError:
            self._log(loss, data.valid_tokens, global_tokens, grad_norm, lr)  # so that its data can be shown
            raise
        self.lr_schedulers.step()
        if self.metrics_processor.should_log(self.step):
            self._log(loss, data.valid_tokens, global_tokens, grad_norm, lr)

    def _seed(self) -> None:
        # Dropout draws from (seed, step, rank), so that a resumed run draws what an uninterrupted one does. Ranks that
        # share a sequence draw alike: they drop out the same embeddings, and parts of the same sums.
        seed, (rank, dp_degree) = self.job_config.debug.seed or 0, self._batch_rank()
        if self.parallel_dims.pp_enabled:
            rank += dp_degree * self.parallel_dims.get_mesh("pp").get_local_rank()
        own = step_seed(seed, self.step, rank)
        torch.default_generator.manual_seed(own)  # torch.manual_seed asks for all kinds of devices, a third of a ms
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(own)

    def _collect(self, data_iterator: Iterator[Batch]) -> StepData:
        microbatches: list[Batch] = []
        valid_tokens = digest = 0
        try:
            for _ in range(self.gradient_accumulation_steps):
                microbatches.append(next(data_iterator))
                valid_tokens += int(torch.count_nonzero(microbatches[-1][1] != IGNORE_INDEX))
                digest += self.dataloader.digest
        except DataloaderExhaustedError:
            return StepData(microbatches, valid_tokens, digest, True)
        return StepData(microbatches, valid_tokens, digest, False)

    def _must_end_now(self, exhausted: bool) -> bool:
        """Whether this rank and all others know before the first forward that the data ended; most learn it after."""
        if self.job_config.optimizer.early_step_in_backward:  # whose updates cannot be undone
            (exhausted,) = map(bool, self.context.consensus.max(exhausted))
            return exhausted
        return exhausted and not self.parallel_dims.dp_enabled  # all ranks read the same

    def _cancel(self, position: Position) -> NoReturn:
        self.step -= 1
        self.dataloader.rewind(position)  # this rank's part of the step comes again if the data goes on
        raise DataloaderExhaustedError

    def _run_microbatches(self, microbatches: list[Batch], global_tokens: torch.Tensor) -> torch.Tensor:
        """Forward and backward of each; returns the sum of this rank's losses / global tokens."""
        valid = global_tokens.float()
        copies = [
            ({name: upload(tensor, self.device) for name, tensor in inputs.items()}, upload(labels, self.device))
            for inputs, labels in microbatches
        ]
        losses = [
            self.forward_backward_step(input_dict=inputs, labels=labels, global_valid_tokens=valid).detach()
            for inputs, labels in copies
        ]
        return torch.stack(losses).sum()

    def forward_backward_step(
        self, *, input_dict: dict[str, torch.Tensor], labels: torch.Tensor, global_valid_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Backward of (sum of the local losses / global valid tokens); returns that quotient.

        Replaces torchtitan 0.2.2's, which gives the labels to the loss function: here the model's head takes them and
        never holds all logits. It also divides by the global tokens after the backward of a pipeline, so that gradients
        are too large.
        """
        inputs = dict(input_dict)
        tokens = inputs.pop("input")
        if self.pipeline is not None:
            with self.train_context():
                scale = 1 / global_valid_tokens
                return self.pipeline.sum_losses(tokens, labels, inputs.get("positions"), scale=scale, backward=True)
        with self.train_context():
            loss = self.model_parts[0](tokens, **inputs, labels=labels) / global_valid_tokens
            loss.backward()
        return loss

    def _update(self, norm: torch.Tensor) -> None:
        self.gradients.clip(self.job_config.training.max_norm, norm)
        self.optimizers.step()

    def check_state(self) -> None:
        """Raises NonFiniteError, on all ranks, if the weights or the optimizer may not be saved.

        Raises UserError, on all ranks, if the run folder is gone: the save would make another one.
        """
        self.context.consensus.first(self.run.check_place)
        if bad := nonfinite.find_bad_state(self.model_parts, self.optimizers, self.context.consensus):
            raise NonFiniteError(
                f"step {self.step}: not finite after it: {bad}; it is not saved, what was saved before is kept; "
                f"{self._show_data()}"
            )

    def _show_data(self) -> str:
        shown = command("scripts/flame.sh", "data", "show", self.run.folder, "--step", str(self.step))
        return f"its data, of digest {self.data_digest}: {shown}"

    def _log(self, loss: torch.Tensor, local_tokens: int, global_tokens: int, grad_norm: float, lr: float) -> None:
        dims = self.parallel_dims
        if dims.pp_enabled:  # the last stage has it, the others zero
            dist.all_reduce(loss, group=dims.get_mesh("pp").get_group())
        waited = upload(torch.tensor(sum(self.metrics_processor.data_loading_times)), self.device)
        figures = torch.stack([loss, loss, waited])
        if dims.dp_cp_enabled:
            mean, largest = figures[:1], figures[1:]
            group = dims.get_mesh("loss").get_group()
            dist.all_reduce(mean, group=group)
            if dims.cp_enabled:
                dist.all_reduce(largest[:1], group=dims.get_mesh("cp").get_group())
            largest[0] = largest[0] * float(global_tokens) / local_tokens
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        mean_loss, max_loss, waited_seconds = figures.tolist()
        extra = {"lr": lr, "tokens": self.tokens, "data_digest": self.data_digest}
        extra["data/wait_seconds"] = waited_seconds  # since the last log, on the rank that waited longest
        if self.job_config.training.skip_nan_inf:
            extra["optimizer/skipped_step"] = self.skips.total
        extra |= self.accounting.count_sources()
        self.metrics_processor.log(self.step, mean_loss, max_loss, grad_norm, extra)
        self.run.set_status("running", step=self.step, tokens=self.tokens)

    def _batch_rank(self) -> tuple[int, int]:
        """This rank among those that read data of their own, and their number."""
        if not self.parallel_dims.dp_enabled:
            return 0, 1
        mesh = self.parallel_dims.get_mesh("batch")
        return mesh.get_local_rank(), mesh.size()

    # -- what a checkpoint holds of the trainer -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        counted = {"step": self.step, "tokens": self.tokens, "skipped_steps": self.skips.total}
        return {**counted, "data_digest": self.data_digest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        counted = {"skipped_steps": 0, **state_dict}
        for name, kind in {"step": int, "tokens": int, "skipped_steps": int, "data_digest": str}.items():
            if not isinstance(value := counted.get(name, kind()), kind):
                raise UserError("train_state", f"{name} {str(value)[:40]!r}", f"of type {kind.__name__}")
        self.skips.total = counted.pop("skipped_steps")
        for name, value in counted.items():
            setattr(self, name, value)
        self.resumed_at = self.step


def can_skip_on_device(optimizers: OptimizersContainer) -> bool:
    """Whether a step of the optimizers obeys `found_inf`: all are fused, and nothing else is updated before them."""
    fused = all(group.get("fused") for optimizer in optimizers for group in optimizer.param_groups)
    return fused and not optimizers._optimizer_step_pre_hooks  # of mixtures: the experts' biases


def compile_seconds() -> float:
    """Seconds that torch.compile has taken in this process."""
    utils = sys.modules.get("torch._dynamo.utils")  # seconds to import: only a job that compiles has done so
    return 0.0 if utils is None else utils.calculate_time_spent()["total_wall_time"]


def use_our_checkpoint_manager() -> None:
    """Workaround: torchtitan 0.2.2's Trainer makes the CheckpointManager of its module (train.py); there is no hook."""
    torchtitan.train.CheckpointManager = CheckpointManager
