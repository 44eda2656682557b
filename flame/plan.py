"""What can be refused before a process group or a folder exists: `check(config, world_size)`. Imports no torch."""

import os
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path

from flame.config import JobConfig
from flame.errors import UserError
from flame.input import check_data, check_model

_FROM_1 = (
    *("training.steps", "training.local_batch_size", "training.seq_len", "training.context_len", "training.gc_freq"),
    *("training.dataloader.prefetch_factor", "data.lanes", "data.window", "metrics.log_freq", "checkpoint.interval"),
    *("lr_scheduler.total_steps", "profiling.profile_freq", "comm.init_timeout_seconds", "comm.train_timeout_seconds"),
)
_FROM_0 = (
    *("training.dataloader.num_workers", "lr_scheduler.warmup_steps", "checkpoint.keep_latest_k"),
    *("comm.trace_buf_size", "optimizer.weight_decay", "debug.seed"),
)
_UP_TO_1 = ("optimizer.beta1", "optimizer.beta2", "lr_scheduler.decay_ratio", "lr_scheduler.min_lr_factor")
_ABOVE_0 = ("optimizer.lr", "optimizer.eps", "training.max_norm")


def check(config: JobConfig, world_size: int) -> None:
    """Refuse, with one UserError, a config that could not train on `world_size` processes."""
    _check_ranges(config)
    for section in ("validation", "fault_tolerance"):
        if getattr(config, section).enable:
            raise UserError(f"--{section}.enable: found true, must be false in this version")
    data_parallel = _check_parallelism(config, world_size)
    _check_batch(config, data_parallel)
    check_model(config)
    check_data(config)
    _check_folders(config)


def _check_ranges(config: JobConfig) -> None:
    rules: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
        (_FROM_1, lambda v: v >= 1, "1 or more"),
        (_FROM_0, lambda v: v >= 0, "0 or more"),
        (_UP_TO_1, lambda v: 0 <= v <= 1, "from 0 to 1"),
        (_ABOVE_0, lambda v: v > 0, "more than 0"),
        (("checkpoint.load_step",), lambda v: v >= -1, "-1 (the newest) or a step"),
    )
    for paths, holds, allowed in rules:
        for path in paths:
            value = attrgetter(path)(config)
            if value is not None and not holds(value):
                raise UserError(f"--{path}: found {value}, must be {allowed}")
    training, profiling = config.training, config.profiling
    if config.checkpoint.keep_latest_k == 1:
        raise UserError("--checkpoint.keep_latest_k: found 1, must be 0 (keep all) or 2 or more")
    if training.context_len is not None and training.context_len > training.seq_len:
        raise UserError(
            f"--training.context_len: found {training.context_len}, must be at most training.seq_len {training.seq_len}"
        )
    if config.optimizer.name not in ("Adam", "AdamW"):
        raise UserError(f"--optimizer.name: found {config.optimizer.name!r}, must be Adam or AdamW")
    cycle = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < cycle:
        raise UserError(
            f"--profiling.profile_freq: found {profiling.profile_freq}, must be {cycle} or more "
            "(profiling.profiler_warmup + profiling.profiler_active)"
        )


def _check_parallelism(config: JobConfig, world_size: int) -> int:
    """The data-parallel degree; UserError for a layout this version does not have or these ranks do not make."""
    p = config.parallelism
    for kind in ("tensor", "pipeline", "context", "expert", "expert_tensor"):
        if (degree := getattr(p, f"{kind}_parallel_degree")) != 1:
            raise UserError(
                f"--parallelism.{kind}_parallel_degree: found {degree}, must be 1 in this version; "
                "ranks share the work by data_parallel_shard_degree (FSDP) or _replicate_degree (DDP, HSDP)"
            )
    replicate, shard = p.data_parallel_replicate_degree, p.data_parallel_shard_degree
    if replicate < 1:
        raise UserError(f"--parallelism.data_parallel_replicate_degree: found {replicate}, must be 1 or more")
    if shard < 1 and shard != -1:
        raise UserError(f"--parallelism.data_parallel_shard_degree: found {shard}, must be -1 (all ranks) or 1 or more")
    if world_size % replicate or (shard != -1 and replicate * shard != world_size):
        shards = "" if shard == -1 else f" x data_parallel_shard_degree {shard}"
        verb = "does not divide" if shard == -1 else "must equal"
        raise UserError(
            f"--parallelism.data_parallel_replicate_degree {replicate}{shards} {verb} the number of ranks, {world_size}"
        )
    if config.checkpoint.create_seed_checkpoint and world_size != 1:
        raise UserError(f"--checkpoint.create_seed_checkpoint: found {world_size} processes, needs 1 (NNODE=1 NGPU=1)")
    return world_size


def _check_batch(config: JobConfig, data_parallel: int) -> None:
    lanes, batch = config.data.lanes, config.training.global_batch_size
    if lanes % data_parallel:
        raise UserError(
            f"--data.lanes: found {lanes}, must be a multiple of the {data_parallel} data-parallel ranks: "
            f"{_multiples(lanes, data_parallel)} would work"
        )
    local = config.training.local_batch_size
    step = local * data_parallel
    if batch != -1 and (batch < 1 or batch % step):
        raise UserError(
            f"--training.global_batch_size: found {batch}, must be a multiple of training.local_batch_size {local} x "
            f"{data_parallel} data-parallel ranks: {_multiples(batch, step)} would work"
        )


def _multiples(value: int, step: int) -> str:
    below = max(value, 0) // step * step
    return f"{below} or {below + step}" if below else f"{step}"


def _check_folders(config: JobConfig) -> None:
    dump, checkpoint = Path(config.job.dump_folder), config.checkpoint
    for folder in (dump, *dump.parents):
        if os.path.exists(folder):
            if not os.path.isdir(folder):
                raise UserError(f"--job.dump_folder: {folder} is a file, must be a folder")
            break
    if checkpoint.create_seed_checkpoint and not checkpoint.enable:
        raise UserError("--checkpoint.create_seed_checkpoint: checkpoint.enable is false, must be true")
    initial = checkpoint.initial_load_path
    if initial and "://" not in initial and not os.path.exists(initial):
        raise UserError(f"--checkpoint.initial_load_path: there is no {initial}")
    steps = dump / checkpoint.folder
    there = sorted(_steps(steps))
    if checkpoint.enable and checkpoint.load_step > 0 and checkpoint.load_step not in there:
        found = f"steps there: {', '.join(map(str, there))}" if there else "there is none at all"
        raise UserError(f"--checkpoint.load_step: no whole step-{checkpoint.load_step} in {steps}, {found}")
    if checkpoint.enable and not there and not initial and any(steps.glob("step-*")):
        raise UserError(f"--checkpoint.folder: no complete checkpoint in {steps}; move it away to start anew")


def _steps(folder: Path) -> Iterator[int]:
    """Steps with a whole checkpoint: the metadata is written last."""
    for metadata in folder.glob("step-*/.metadata"):
        if (step := metadata.parent.name.removeprefix("step-")).isdecimal():
            yield int(step)
