"""A logged step: one progress line, one record in metrics.jsonl, and torchtitan's TensorBoard and W&B."""

import copy
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from torchtitan.components.metrics import (
    LoggerContainer,
    MetricsProcessor,
    TensorBoardLogger,
    WandBLogger,
    _get_metrics_rank,
)
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import NoColor, get_peak_flops

from flame.config.files import read_text
from flame.config.schema import JobConfig
from flame.errors import first_line
from flame.runtime.atomic import write_atomically
from flame.training.context import RunContext

_USUAL_MFU = 0.5
_LAUNCH_SECONDS = 2e-3  # of the host for a block, forward and backward; see docs/benchmarks.md
_FALLBACK_PEAK = 312e12  # torchtitan 0.2.2 (tools/utils.py) takes an unknown device for an A100


class TensorBoard(TensorBoardLogger):
    """torchtitan's, which makes a folder for each start, in one folder for all starts of a run."""

    def __init__(self, folder: str, step: int) -> None:
        self.tag, self.writer = None, SummaryWriter(folder, max_queue=1000, purge_step=step + 1)


class Metrics(MetricsProcessor):
    """torchtitan's metrics processor with an ETA, and an MFU only where the device's peak FLOPS are known."""

    time_last_log: float
    ntokens_since_last_log: int

    def __init__(
        self, context: RunContext, job_config: JobConfig, parallel_dims: ParallelDims, _model_args: Any
    ) -> None:
        silent = copy.copy(job_config)
        silent.metrics = replace(job_config.metrics, enable_tensorboard=False, enable_wandb=False)
        super().__init__(silent, parallel_dims)
        self.job_config, self.context, self.run, self.steps_since_last_log = job_config, context, context.run, 0
        self.failed = False  # TensorBoard or W&B
        if os.environ.get("NO_COLOR"):  # https://no-color.org; train.sh sets it when its output is not a terminal
            self.color = NoColor()
        self.peak_flops = known_peak_flops(self.device_memory_monitor.device_name)

    def open(self, step: int) -> None:
        """Open TensorBoard and W&B after `step`, when nothing can reject the start any more; both write into tb/.

        TensorBoard drops what earlier starts logged of later steps.
        """
        settings, rank = self.job_config.metrics, dist.get_rank()
        if settings.enable_wandb:
            _name_wandb_run(self.context)
        threading.excepthook = partial(_report_once, threading.excepthook)
        if not settings.save_for_all_ranks and rank != _get_metrics_rank(self.parallel_dims, self.job_config):
            return
        own = f"rank_{rank}" if settings.save_for_all_ranks else ""
        folder = str(self.run.folder / settings.save_tb_folder / own)
        self.logger = loggers = LoggerContainer()
        if settings.enable_wandb:
            try:
                loggers.add_logger(WandBLogger(folder, self.job_config))
            except Exception as error:  # wandb's own, and whatever its service raises
                logger.warning(f"W&B could not be started: {first_line(error)}; the run goes on without")
        with self._surviving():
            if settings.enable_tensorboard:
                loggers.add_logger(TensorBoard(folder, step))

    def log(self, step: int, loss: float, max_loss: float, grad_norm: float, extra_metrics: dict[str, Any]) -> None:
        """Log a step. `loss` is the mean over the step's global valid tokens, `grad_norm` the norm before clipping.

        `extra_metrics` must hold lr, tokens (seen by the run so far) and data_digest.
        """
        seconds = time.perf_counter() - self.time_last_log
        rate = self.ntokens_since_last_log / seconds / self.parallel_dims.non_data_parallel_size  # per device
        flops = self.num_flops_per_token * rate
        record = {
            "step": step,
            "loss": loss,
            "max_loss": max_loss,
            "grad_norm": grad_norm,
            **extra_metrics,
            "tokens_per_second": rate * self.parallel_dims.world_size,
            "tflops": flops / 1e12,
            "mfu": None if self.peak_flops is None else flops / self.peak_flops,
            "step_seconds": seconds / max(1, self.steps_since_last_log),
            "data/wait_share": sum(self.data_loading_times) / seconds,
            "memory_gib": self.device_memory_monitor.get_peak_stats().max_reserved_gib,
        }
        self.run.log({name: _json_number(value) for name, value in record.items()})
        self._show({name: value for name, value in record.items() if isinstance(value, int | float)}, step)
        self._print(record)

        self.ntokens_since_last_log = self.steps_since_last_log = 0
        self.data_loading_times.clear()
        self.time_last_log = time.perf_counter()
        self.device_memory_monitor.reset_peak_stats()

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        """Log a validation as a record of its own. extra_metrics: validation/seconds, kept out of training's speed."""
        record = {"validation/loss": loss, **(extra_metrics or {})}
        self.run.log({"step": step, **{name: _json_number(value) for name, value in record.items()}})
        self._show(record, step)
        logger.info(f"validation after step {step}: loss {loss:.4f}")
        self.time_last_log += record.get("validation/seconds", 0.0)

    def close(self) -> None:
        """Close TensorBoard and W&B; a failure to write them does not end the run."""
        with self._surviving():
            super().close()

    def _show(self, record: dict[str, Any], step: int) -> None:
        with self._surviving():
            self.logger.log(record, step)

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # W&B has its own; TensorBoard raises an OSError again from every call
            if not self.failed:
                logger.warning(f"TensorBoard or W&B could not be written: {first_line(error)}; the run goes on without")
            self.failed = True

    def _print(self, record: dict[str, Any]) -> None:
        color, steps = self.color, self.job_config.training.steps
        eta = timedelta(seconds=round((steps - record["step"]) * record["step_seconds"]))
        mfu = "" if record["mfu"] is None else f"mfu {record['mfu']:.1%}  "
        logger.info(
            f"{color.red}step {record['step']}/{steps}  "
            f"{color.green}loss {record['loss']:.4f}  "
            f"{color.orange}grad_norm {record['grad_norm']:.4f}  "
            f"{color.yellow}lr {record['lr']:.2e}  "
            f"{color.blue}{record['tokens_per_second']:,.0f} tokens/s  "
            f"{color.magenta}{mfu}"
            f"{color.turquoise}memory {record['memory_gib']:.2f} GiB  "
            f"{color.cyan}eta {eta}{color.reset}"
        )


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN and no infinity


def known_peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a device torchtitan knows by name, else None."""
    if "H20" in device_name and "H200" not in device_name:
        return 148e12  # as torchtitan's table has it; torchtitan asks lspci first, which calls the chip GH100
    peak = get_peak_flops(device_name)
    return peak if peak != _FALLBACK_PEAK or "A100" in device_name else None


def advise_rows(rows: int, seq_len: int, flops_per_token: float, blocks: int, peak_flops: float) -> str | None:
    """What to say of microbatches that a GPU computes faster than the host launches their kernels; None if it does not.

    rows, seq_len: of a microbatch; flops_per_token, blocks: of the model on this rank, forward and backward.
    """
    computed = rows * seq_len * flops_per_token / (_USUAL_MFU * peak_flops)
    launched = blocks * _LAUNCH_SECONDS
    if computed >= launched:
        return None
    needed = math.ceil(rows * launched / computed)
    return (
        f"the GPU may wait for the host: {rows} x {seq_len:,} tokens of a microbatch take it {1e3 * computed:.0f} ms at"
        f" {_USUAL_MFU:.0%} MFU, and the host about {1e3 * launched:.0f} ms, {1e3 * _LAUNCH_SECONDS:.0f} for each of"
        f" {blocks} blocks, to launch; {needed} rows would fill it (docs/benchmarks.md)"
    )


def _report_once(others: Callable[..., object], failure: threading.ExceptHookArgs) -> None:
    """What a thread's exception is reported by; TensorBoard's writer raises its OSErrors again from every call."""
    of_tensorboard = type(failure.thread).__module__.startswith("tensorboard.")
    if not (of_tensorboard and isinstance(failure.exc_value, OSError)):
        others(failure)


def _name_wandb_run(context: RunContext) -> None:
    # torchtitan reads these variables. The id lives in the run folder, so that a resumed run continues its W&B run.
    folder = context.run.folder

    def name() -> str:
        known = folder / "wandb_run_id"
        number = made_in = ""
        with suppress(OSError, ValueError):  # not there, or damaged
            number, _, made_in = read_text(known).strip().partition("\n")
        is_copy = made_in and Path(made_in, known.name).exists() and not os.path.samefile(made_in, folder)
        if number and number.isprintable() and not is_copy:
            return number
        number = os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12]
        with suppress(OSError):
            write_atomically(known, f"{number}\n{folder.resolve()}\n")
        return number

    os.environ.setdefault("WANDB_RUN_ID", context.consensus.first(name))  # in a pipeline, the last stage logs
    os.environ.setdefault("WANDB_RESUME", "allow")
    os.environ.setdefault("WANDB_PROJECT", "flame")
    os.environ.setdefault("WANDB_RUN_NAME", folder.resolve().name)
