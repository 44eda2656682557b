"""What can be refused before a process group or a folder exists: `check(config, world_size)`. Imports no torch."""

import importlib.util
import math
import os
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

from flame.checkpoint.start import check_orphaned_checkpoints, plan_start
from flame.config.parser import JobConfig
from flame.data.settings import check_lanes, parse_skip
from flame.errors import UserError, near_multiples
from flame.parallel import pipeline_schedule
from flame.preflight.inputs import check_data, check_model
from flame.runtime import stop

_FROM_1 = (
    *("training.steps", "training.local_batch_size", "training.seq_len", "training.context_len", "training.gc_freq"),
    *("training.dataloader.prefetch_factor", "metrics.log_freq", "checkpoint.interval"),
    *("validation.local_batch_size", "validation.seq_len", "validation.freq"),
    *("lr_scheduler.total_steps", "profiling.profile_freq", "comm.init_timeout_seconds", "comm.train_timeout_seconds"),
)
_FROM_0 = (
    *("data.epochs", "data.max_bad_rows", "training.max_skipped_steps"),
    *("training.dataloader.num_workers", "lr_scheduler.warmup_steps", "checkpoint.keep_latest_k"),
    *("comm.trace_buf_size", "optimizer.weight_decay", "debug.seed", "checkpoint.keep_every"),
)
_INNER = ("tensor", "pipeline", "context")  # what divides a model, and not the batch
_BELOW_1 = ("optimizer.beta1", "optimizer.beta2")
_UP_TO_1 = ("lr_scheduler.decay_ratio", "lr_scheduler.min_lr_factor")
_CONVERTERS = {f"quantize.{kind}.{name}" for kind in ("linear", "grouped_mm") for name in ("float8", "mx")}
_MAY_BE_LEFT_OUT = ("optimizer", "lr_scheduler", "dataloader", "train_state")
_ABOVE_0 = ("optimizer.lr", "optimizer.eps", "training.max_norm")


def check(config: JobConfig, world_size: int, *, is_first: bool = True) -> None:
    """Raises UserError for a config that could not train on `world_size` processes.

    is_first: look at the checkpoints too, whose files one rank reads for all.
    """
    _check_ranges(config)
    _check_choices(config)
    if config.fault_tolerance.enable:
        raise UserError("--fault_tolerance.enable: found true, must be false in this version")
    data_parallel = _check_parallelism(config, world_size)
    _check_batch(config, data_parallel)
    check_model(config)
    check_data(config.training, config.data)
    _check_validation(config)
    _check_folders(config)
    if is_first:
        _check_start(config)


def _check_ranges(config: JobConfig) -> None:
    rules: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
        (_FROM_1, lambda v: 1 <= v < 2**62, "1 or more, and below 2^62"),
        (_FROM_0, lambda v: 0 <= v < 2**62, "0 or more, and below 2^62"),
        (_BELOW_1, lambda v: 0 <= v < 1, "0 or more and below 1"),
        (_UP_TO_1, lambda v: 0 <= v <= 1, "from 0 to 1"),
        (_ABOVE_0, lambda v: 0 < v < math.inf, "more than 0, and finite"),
        (("job.mfu",), lambda v: 0 < v <= 1, "more than 0 and at most 1"),
        (("checkpoint.load_step",), lambda v: v >= -1, "-1 (the newest) or a step"),
        (("data.exhausted_exit_code",), lambda v: v in (0, 1), "0 or 1"),
    )
    for paths, holds, allowed in rules:
        for path in paths:
            value = attrgetter(path)(config)
            if value is not None and not holds(value):
                raise UserError(f"--{path}: found {value}, must be {allowed}")
    parse_skip(config.data.skip)
    if config.training.max_wall_time is not None:
        stop.seconds(config.training.max_wall_time)
    training, profiling, checkpoint = config.training, config.profiling, config.checkpoint
    if config.lr_scheduler.total_steps is not None and config.lr_scheduler.total_steps < training.steps:
        raise UserError(
            f"--lr_scheduler.total_steps: found {config.lr_scheduler.total_steps}, must be at least training.steps "
            f"{training.steps}; beyond its end the learning rate would be negative"
        )
    if checkpoint.keep_latest_k == 1:
        raise UserError("--checkpoint.keep_latest_k: found 1, must be 0 (keep all) or 2 or more")
    every = checkpoint.keep_every if checkpoint.enable else 0
    if every and (checkpoint.interval_type == "seconds" or every % checkpoint.interval):
        raise UserError(
            f"--checkpoint.keep_every: found {every}, must be a multiple of checkpoint.interval, in steps "
            f"({checkpoint.interval} {checkpoint.interval_type}): no other checkpoints are there to keep"
        )
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


def _check_choices(config: JobConfig) -> None:
    """Refuse what torchtitan would trip over later, or what would silently do nothing of what it says."""
    if config.comm.mode != "default":
        raise UserError(f"--comm.mode: found {config.comm.mode}, must be default; the others train nothing real")
    if unknown := set(config.model.converters) - _CONVERTERS:
        raise UserError(f"--model.converters: found {min(unknown)}, must be among {', '.join(sorted(_CONVERTERS))}")
    if config.training.skip_nan_inf and config.optimizer.early_step_in_backward:
        raise UserError("--training.skip_nan_inf: --optimizer.early_step_in_backward updates before it can be known")
    if config.compile.enable and "model" not in config.compile.components:
        found = ", ".join(config.compile.components) or "nothing"
        raise UserError(f"--compile.components: found {found}, must have model: nothing else of a job is compiled")
    ac = config.activation_checkpoint
    if ac.mode == "memory_budget" and not config.compile.enable:
        raise UserError("--activation_checkpoint.mode: memory_budget needs --compile.enable")
    if ac.selective_ac_option != "op" and not ac.selective_ac_option.isdecimal():
        found = ac.selective_ac_option
        raise UserError(f"--activation_checkpoint.selective_ac_option: found {found!r}, must be op or a whole number")
    if (module := config.experimental.custom_import) and importlib.util.find_spec(module.partition(".")[0]) is None:
        raise UserError(f"--experimental.custom_import: there is no module {module}")
    if config.checkpoint.last_save_in_hf:
        raise UserError("--checkpoint.last_save_in_hf: the export (--checkpoint.export) does that, in hf/step-N")
    if config.checkpoint.initial_load_in_hf and not config.checkpoint.initial_load_path:
        raise UserError("--checkpoint.initial_load_in_hf: --checkpoint.initial_load_path must name a folder or hub id")
    if config.checkpoint.initial_load_in_hf and not config.checkpoint.initial_load_model_only:
        raise UserError("--checkpoint.initial_load_model_only: found false, must be true for Hugging Face weights")


def _check_parallelism(config: JobConfig, world_size: int) -> int:
    """The data-parallel degree; UserError for a layout this version does not have or these ranks do not make."""
    p = config.parallelism
    degrees = {f"{kind}_parallel_degree": getattr(p, f"{kind}_parallel_degree") for kind in _INNER}
    degrees |= {"data_parallel_replicate_degree": p.data_parallel_replicate_degree}
    shard = p.data_parallel_shard_degree
    for name, degree in degrees.items():
        if degree < 1:
            raise UserError(f"--parallelism.{name}: found {degree}, must be 1 or more")
    if shard < 1 and shard != -1:
        raise UserError(f"--parallelism.data_parallel_shard_degree: found {shard}, must be -1 (all ranks) or 1 or more")
    if shard != -1:
        degrees["data_parallel_shard_degree"] = shard
    ranks = math.prod(degrees.values())
    if world_size % ranks or (shard != -1 and ranks != world_size):
        said = {name: degree for name, degree in degrees.items() if degree > 1 or name.startswith("data")}
        asked = " x ".join(f"{name} {degree}" for name, degree in said.items())
        verb = "does not divide" if shard == -1 else "must equal"
        raise UserError(f"--parallelism.{asked} {verb} the number of ranks, {world_size}")
    if config.checkpoint.create_seed_checkpoint and world_size != 1:
        raise UserError(f"--checkpoint.create_seed_checkpoint: found {world_size} processes, needs 1 (NNODE=1 NGPU=1)")
    inner = math.prod(degrees[f"{kind}_parallel_degree"] for kind in _INNER)
    data_parallel = world_size // inner
    replicas = p.data_parallel_replicate_degree
    ddp = replicas == data_parallel > 1 and p.context_parallel_degree == 1  # whose ranks FSDP2 shards over
    if ddp and inner > 1:
        raise UserError(
            f"--parallelism.data_parallel_replicate_degree: found {replicas}, must be 1 beside tensor or pipeline "
            "parallelism: replicas that share no weights (DDP) go with no other layout; leave the ranks to FSDP"
        )
    if config.optimizer.early_step_in_backward and (ddp or p.pipeline_parallel_degree > 1):
        why = "each replica (DDP) would update with its own gradient" if ddp else "torchtitan has none for pipelines"
        raise UserError(f"--optimizer.early_step_in_backward: found true, must be false: {why}")
    if p.pipeline_parallel_degree > 1:
        _check_microbatches(config)
    _check_experts(config, data_parallel // replicas)
    return data_parallel


def _check_experts(config: JobConfig, shard: int) -> None:
    """Refuse an expert parallelism that `shard` FSDP2 ranks do not make."""
    p = config.parallelism
    expert, together = p.expert_parallel_degree, p.expert_tensor_parallel_degree
    if (expert, together) == (1, 1):
        return
    if config.model.name == "auto":
        raise UserError(
            f"--parallelism.expert_parallel_degree: found {expert} (and expert_tensor_parallel_degree {together}), "
            "must be 1 for models of transformers and fla; torchtitan's experts can be divided (--model.name)"
        )
    # With the other choice that torchtitan 0.2.2 has, 1, tensor ranks share tokens, and their gradient is not added up.
    if together != (needed := p.tensor_parallel_degree if expert > 1 else 1):
        raise UserError(
            f"--parallelism.expert_tensor_parallel_degree: found {together}, must be {needed}: tensor_parallel_degree "
            "where expert_parallel_degree is above 1, and else 1"
        )
    if expert < 1 or shard < 2 or shard % expert:
        raise UserError(
            f"--parallelism.expert_parallel_degree: found {expert}, must divide the ranks that FSDP2 shards over, 2 or "
            f"more, found {shard}"
        )


def _check_microbatches(config: JobConfig) -> None:
    p, batch = config.parallelism, config.training.local_batch_size
    size, path = p.pipeline_parallel_microbatch_size, p.pipeline_parallel_schedule_csv
    if size < 1 or batch % size:
        raise UserError(
            f"--parallelism.pipeline_parallel_microbatch_size: found {size}, must divide training.local_batch_size "
            f"{batch}"
        )
    if path and not os.path.isfile(path):
        raise UserError(f"--parallelism.pipeline_parallel_schedule_csv: there is no file {path}")
    least = {"layers_per_stage": 1, "first_stage_less_layers": 0, "last_stage_less_layers": 0}
    for name, low in least.items():
        found = getattr(p, f"pipeline_parallel_{name}")
        if found is not None and found < low:
            raise UserError(f"--parallelism.pipeline_parallel_{name}: found {found}, must be {low} or more")
    pipeline_schedule.validate(config)


def _check_batch(config: JobConfig, data_parallel: int) -> None:
    check_lanes(config.data, data_parallel)
    batch = config.training.global_batch_size
    local = config.training.local_batch_size
    step = local * data_parallel
    if batch != -1 and (batch < 1 or batch % step):
        raise UserError(
            f"--training.global_batch_size: found {batch}, must be a multiple of training.local_batch_size {local} x "
            f"{data_parallel} data-parallel ranks: {near_multiples(batch, step)} would work"
        )


def _check_validation(config: JobConfig) -> None:
    if not config.validation.enable:
        return
    if not config.validation.dataset:
        raise UserError("--validation.dataset: not set, must be a local path or a hub id, or a comma list of them")
    check_data(config.validation, config.data)
    validation, training = config.validation, config.training
    if config.parallelism.pipeline_parallel_degree > 1:  # whose stages take batches of one shape
        for name in ("local_batch_size", "seq_len"):
            found, needed = getattr(validation, name), getattr(training, name)
            if found != needed:
                raise UserError(f"--validation.{name}: found {found}, must be training.{name} {needed} in a pipeline")


def _check_folders(config: JobConfig) -> None:
    if not config.job.dump_folder:
        raise UserError("--job.dump_folder: found nothing, must be a folder")
    dump, checkpoint = Path(config.job.dump_folder), config.checkpoint
    for folder in (dump, *dump.parents):
        if os.path.exists(folder):
            if not os.path.isdir(folder):
                raise UserError(f"--job.dump_folder: {folder} is a file, must be a folder")
            if not os.access(folder, os.W_OK):
                raise UserError(f"--job.dump_folder: {folder} may not be written to")
            break
    if checkpoint.create_seed_checkpoint and not checkpoint.enable:
        raise UserError("--checkpoint.create_seed_checkpoint: checkpoint.enable is false, must be true")
    if os.path.normpath(checkpoint.folder).startswith(("..", "/")) or os.path.normpath(checkpoint.folder) == ".":
        raise UserError(f"--checkpoint.folder: found {checkpoint.folder!r}, must be a folder inside job.dump_folder")
    for flag, path in (("job.dump_folder", config.job.dump_folder), ("checkpoint.folder", checkpoint.folder)):
        if "://" in path:
            raise UserError(f"--{flag}: found {path}, must be a folder of this machine's file system")
    if os.path.normpath(checkpoint.folder) in ("hf", "model"):
        raise UserError(f"--checkpoint.folder: found {checkpoint.folder}, where a run has its exports or its config")
    if checkpoint.create_seed_checkpoint and checkpoint.initial_load_path:
        raise UserError("--checkpoint.create_seed_checkpoint: --checkpoint.initial_load_path must not be set beside it")
    if unknown := set(checkpoint.exclude_from_loading) - set(_MAY_BE_LEFT_OUT):
        allowed = ", ".join(_MAY_BE_LEFT_OUT)
        raise UserError(f"--checkpoint.exclude_from_loading: found {min(unknown)}, must be among {allowed}")


def _check_start(config: JobConfig) -> None:
    """Look at the checkpoints of the run, and at what it starts from."""
    dump, checkpoint = Path(config.job.dump_folder), config.checkpoint
    start = plan_start(config)
    if start.mode != "resume":
        check_orphaned_checkpoints(checkpoint, dump)
    if start.mode == "init" and checkpoint.initial_load_in_hf:
        from flame.convert.hf_weights import check_source  # here: it imports numpy

        assert checkpoint.initial_load_path
        check_source(checkpoint.initial_load_path, may_download=config.model.name == "auto")
    if checkpoint.create_seed_checkpoint and start.mode == "resume":
        raise UserError(f"--checkpoint.create_seed_checkpoint: {dump / checkpoint.folder} holds checkpoints already")
