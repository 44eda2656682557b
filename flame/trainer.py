"""torchtitan's Trainer with a step that is right in every layout, a provable data stream, and a run folder."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.train
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger

from flame.checkpoint.export import export_checkpoint, record_assets
from flame.checkpoint.manager import CheckpointManager, complete_steps
from flame.config import to_toml, with_absolute_paths
from flame.data.ledger import digest_batch, roll
from flame.models.loss import IGNORE_INDEX
from flame.run import Run

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


class NonFiniteError(RuntimeError):
    """The loss or a gradient is NaN or infinite, and training was asked not to skip such steps."""


class FlameTrainer(torchtitan.train.Trainer):
    """Differs from torchtitan's Trainer in what a step and a save do; see `train_step`."""

    def __init__(self, job_config: Any) -> None:
        torchtitan.train.CheckpointManager = CheckpointManager  # 0.2.2 has no hook for it
        super().__init__(job_config)
        if job_config.training.mixed_precision_param == "float32":
            self.maybe_enable_amp = nullcontext()  # 0.2.2 asks autocast for float32, which CPU refuses at every step
        training = job_config.training
        sequences = self.gradient_accumulation_steps * training.local_batch_size * self._batch_ranks()[1]
        self.step_tokens = sequences * training.seq_len  # of the whole job
        self.tokens = 0
        self.skipped_steps = 0
        self.data_digest = ""
        self.resumed_at: int | None = None
        self.last_save = time.monotonic()
        self.run = Run(job_config.job.dump_folder, writes=dist.get_rank() == 0)
        self.metrics_processor.run = self.run
        self.run.start(to_toml(with_absolute_paths(job_config)), self._device())
        if self.run.writes:
            record_assets(self.run.folder / "model", self.model_parts[0].hf, self.tokenizer.hf)

    # -- one step -----------------------------------------------------------------------------------------------------

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        """One optimizer step over the step's global batch.

        Replaces torchtitan's whole method, because what flame adds lies between its lines: the ranks agree on the
        batch (tokens, digest, end of data) before the first forward, and on finite gradients before the update.
        """
        self.optimizers.zero_grad()
        lr = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        self._seed_step()
        microbatches, exhausted = self._collect(data_iterator)
        local_tokens, global_tokens, digest = self._agree(microbatches, exhausted)

        losses = []
        for input_dict, labels in microbatches:
            inputs = {name: tensor.to(self.device) for name, tensor in input_dict.items()}
            loss = self.forward_backward_step(
                input_dict=inputs, labels=labels.to(self.device), global_valid_tokens=global_tokens
            )
            losses.append(loss.detach())

        grad_norm = dist_utils.clip_grad_norm_(
            [p for part in self.model_parts for p in part.parameters()],
            self.job_config.training.max_norm,
            foreach=True,
            pp_mesh=self.parallel_dims.get_optional_mesh("pp"),
            ep_enabled=self.parallel_dims.ep_enabled,
        ).item()
        self.checkpointer.maybe_wait_for_staging()
        self._update(grad_norm)

        self.tokens += self.step_tokens
        self.data_digest = roll(self.data_digest, digest)
        self.metrics_processor.steps_since_last_log += 1
        if self.metrics_processor.should_log(self.step):
            self._log(torch.stack(losses).sum(), local_tokens, global_tokens, grad_norm, lr)

    def forward_backward_step(
        self, *, input_dict: dict[str, torch.Tensor], labels: torch.Tensor, global_valid_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Backward of (sum of the local loss / global valid tokens); returns that quotient.

        Mends torchtitan 0.2.2 under DDP: the loss is already divided by the global tokens, and DDP then averages over
        its replicas, which makes gradients too small by their number.
        """
        dims = self.parallel_dims
        averaged = dims.dp_replicate if dims.dp_replicate_enabled and not dims.fsdp_enabled else 1
        loss = super().forward_backward_step(
            input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens / averaged
        )
        return loss / averaged

    def post_dataloading_process(self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor) -> Any:
        """Hand the labels to the model, whose head returns the loss without ever holding all logits."""
        inputs, labels, extra_inputs, extra_kwargs = super().post_dataloading_process(input_dict, labels)
        return inputs, labels, extra_inputs, {**extra_kwargs, "labels": labels}

    def _seed_step(self) -> None:
        # Dropout draws from (seed, step, rank), so that a resumed run draws what an uninterrupted one does.
        seed = self.job_config.debug.seed or 0
        torch.manual_seed((seed * 1_000_003 + self.step) * 65_537 + dist.get_rank())

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
        due = self.checkpointer.enable and time.monotonic() - self.last_save >= self.job_config.checkpoint.interval
        local = torch.tensor([valid, _wrap(digest), exhausted, due], device=self.device)
        agreed = local.clone()
        if self.parallel_dims.dp_enabled:
            dist.all_reduce(agreed, group=self.parallel_dims.get_mesh("batch").get_group())
        total, digest, exhausted_ranks, due_ranks = agreed.tolist()
        if exhausted_ranks:
            self.step -= 1  # the step was not done
            raise DataloaderExhaustedError
        self.checkpointer.due = bool(due_ranks)
        if due_ranks:
            self.last_save = time.monotonic()
        return local[0].float(), torch.tensor(float(total), device=self.device), digest

    def _update(self, grad_norm: float) -> None:
        if math.isfinite(grad_norm):
            self.optimizers.step()
        elif self.job_config.training.skip_nan_inf:
            self.skipped_steps += 1
            logger.warning(f"step {self.step}: gradient norm {grad_norm}, update skipped ({self.skipped_steps} so far)")
        else:
            raise NonFiniteError(
                f"step {self.step}: gradient norm is {grad_norm}; stopped before the update and before any save "
                "(--training.skip_nan_inf skips such steps)"
            )
        self.lr_schedulers.step()

    def _log(
        self, loss: torch.Tensor, local_tokens: torch.Tensor, global_tokens: torch.Tensor, grad_norm: float, lr: float
    ) -> None:
        mean_loss = max_loss = loss.item()
        if self.parallel_dims.dp_cp_enabled:
            mesh = self.parallel_dims.get_optional_mesh("loss")
            mean_loss = dist_utils.dist_sum(loss, mesh)
            max_loss = dist_utils.dist_max(loss * global_tokens / local_tokens, mesh)
        extra = {"lr": lr, "tokens": self.tokens, "data_digest": self.data_digest}
        if self.job_config.training.skip_nan_inf:
            extra["optimizer/skipped_step"] = self.skipped_steps
        self.metrics_processor.log(self.step, mean_loss, max_loss, grad_norm, {**extra, **self._count_sources()})
        self.run.set_status("running", step=self.step, tokens=self.tokens)

    def _count_sources(self) -> dict[str, float]:
        counts = self.dataloader.counts()
        flat = torch.tensor([value for pair in counts.values() for value in pair], dtype=torch.float64).to(self.device)
        if self.parallel_dims.dp_enabled:
            dist.all_reduce(flat, group=self.parallel_dims.get_mesh("batch").get_group())
        pairs = zip(counts, flat.view(-1, 2).tolist(), strict=True)
        record: dict[str, float] = {}
        for name, (tokens, epoch) in pairs:
            record |= {f"data/{name}/tokens": round(tokens), f"data/{name}/epoch": epoch}
        return record

    def _batch_ranks(self) -> tuple[int, int]:
        if not self.parallel_dims.dp_enabled:
            return 0, 1
        mesh = self.parallel_dims.get_mesh("batch")
        return mesh.get_local_rank(), mesh.size()

    # -- a run --------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to the last step or the end of data, whichever all ranks reach first, and leave a status behind."""
        steps = self.job_config.training.steps
        super().train()
        if self.step < steps:
            self.checkpointer.save(self.step, last_step=True)
            self.run.set_status("data_exhausted", step=self.step, tokens=self.tokens)
            return
        if self.resumed_at == steps:
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
        self.run.rewind(self.step)

    def finish(self) -> None:
        """Export the newest checkpoint and say where everything is; on the rank that writes, without a process group.

        Without a group no rank waits at a collective, and no timeout runs, however long a large export takes.
        """
        if not self.run.writes:
            return
        config, folder = self.job_config.checkpoint, self.run.folder
        steps = complete_steps(folder / config.folder) if config.enable else []
        lines = [f"metrics      {folder / 'metrics.jsonl'}"]
        if steps:
            checkpoint = folder / config.folder / f"step-{steps[-1]}"
            lines.append(f"checkpoint   {checkpoint}")
            if config.export:
                export = folder / "hf" / f"step-{steps[-1]}"
                export.parent.mkdir(exist_ok=True)
                export_checkpoint(checkpoint, folder / "model", export, TORCH_DTYPE_MAP[config.export_dtype])
                lines.append(f"model        {export}  (Hugging Face format)")
        lines.append(f"go on        bash train.sh --job.config_file {folder / 'config.toml'} --training.steps N")
        logger.info("\n  ".join([f"{self.run.read_status()['status']} at step {self.step}", *lines]))

    def _device(self) -> dict[str, Any]:
        monitor = self.metrics_processor.device_memory_monitor
        return {"name": monitor.device_name, "memory_gib": monitor.device_capacity_gib, "ranks": dist.get_world_size()}


def _wrap(digest: int) -> int:
    return (digest + 2**63) % 2**64 - 2**63  # signed 64 bit, as torch adds it across ranks


def run(trainer_class: type[FlameTrainer], job_config: Any) -> None:
    """Train `job_config` from start or checkpoint to the end, close everything in order, and export the result."""
    trainer = None
    try:
        trainer = trainer_class(job_config)
        if job_config.checkpoint.create_seed_checkpoint:
            trainer.checkpointer.save(curr_step=0, last_step=True)
            trainer.run.set_status("completed", reason="seed checkpoint")
        else:
            trainer.train()
    except BaseException as error:
        if trainer is not None:
            trainer.run.set_status(
                "failed", step=trainer.step, tokens=trainer.tokens, reason=f"{type(error).__name__}: {error}"
            )
            trainer.close()
        raise
    trainer.close()
    dist.barrier()  # gloo aborts now and then when a rank destroys the group while another still uses it
    dist.destroy_process_group()
    trainer.finish()
