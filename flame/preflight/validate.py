"""Config validation before launch: `check(config, world_size)`. Imports no torch."""

import math
import os
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

from flame.checkpoint.start import check_orphaned_checkpoints, check_places, plan_start
from flame.config.schema import JobConfig
from flame.config.user_module import is_found
from flame.data.settings import check_lanes, parse_skip
from flame.errors import UserError, near_multiples
from flame.parallel import pipeline_schedule
from flame.preflight.inputs import check_data, check_model
from flame.runtime import stop
from flame.runtime.run_folder import FILES, check_own

TOKENS = 2**28  # of a rank in a step, which it holds in memory at once
# What holds for a value, in words too, and the settings whose value it must hold for, unless that is None.
_RANGES: tuple[tuple[Callable[[float], bool], str, tuple[str, ...]], ...] = (
    (
        lambda v: 1 <= v < 2**62,
        "1 or more, and below 2^62",
        (
            *("training.steps", "training.local_batch_size", "training.context_len", "training.gc_freq"),
            *("validation.local_batch_size", "validation.freq", "lr_scheduler.total_steps", "checkpoint.interval"),
            *("metrics.log_freq", "profiling.profile_freq", "profiling.profiler_active"),
        ),
    ),
    (lambda v: 1 <= v <= TOKENS, f"1 or more, and at most {TOKENS}", ("training.seq_len", "validation.seq_len")),
    (
        lambda v: 1 <= v <= 10**9,  # torch counts a timeout in nanoseconds of 64 bits
        "1 or more, and at most 10^9",
        ("comm.init_timeout_seconds", "comm.train_timeout_seconds"),
    ),
    (lambda v: 1 <= v <= 1024, "1 or more, and at most 1024", ("training.dataloader.prefetch_factor",)),
    (
        lambda v: 0 <= v <= 1024,  # threads
        "0 or more, and at most 1024",
        ("training.dataloader.num_workers", "validation.dataloader.num_workers"),
    ),
    (lambda v: 0 <= v < 2**31, "0 or more, and below 2^31", ("comm.trace_buf_size",)),  # torch reads it so
    (
        lambda v: 0 <= v < 2**62,
        "0 or more, and below 2^62",
        (
            *("data.epochs", "data.max_bad_rows", "training.max_skipped_steps", "lr_scheduler.warmup_steps"),
            *("checkpoint.keep_latest_k", "checkpoint.keep_every", "profiling.profiler_warmup"),
            *("optimizer.weight_decay", "debug.seed"),
        ),
    ),
    (lambda v: 0 <= v < 1, "0 or more and below 1", ("optimizer.beta1", "optimizer.beta2")),
    (lambda v: 0 <= v <= 1, "from 0 to 1", ("lr_scheduler.decay_ratio", "lr_scheduler.min_lr_factor")),
    (lambda v: 0 < v < math.inf, "more than 0, and finite", ("optimizer.lr", "training.max_norm")),
    (lambda v: 1e-38 <= v < math.inf, "1e-38 or more, as float32 holds it, and finite", ("optimizer.eps",)),
    (lambda v: 0 < v <= 1, "more than 0 and at most 1", ("job.mfu",)),
    (lambda v: v >= -1, "-1 (the newest) or a step", ("checkpoint.load_step",)),
    (lambda v: v == -1 or v >= 1, "-1 (all of the data) or 1 or more", ("validation.steps",)),
    (lambda v: v in (0, 1), "0 or 1", ("data.exhausted_exit_code",)),
)
_FOLDERS = (
    *("checkpoint.folder", "metrics.save_tb_folder", "profiling.save_traces_folder"),
    *("profiling.save_memory_snapshot_folder", "comm.save_traces_folder"),
)
_CONVERTERS = {f"quantize.{kind}.{name}" for kind in ("linear", "grouped_mm") for name in ("float8", "mx")}
_EXCLUDABLE = ("optimizer", "lr_scheduler", "dataloader", "train_state")


def check(config: JobConfig, world_size: int, *, is_first: bool = True) -> None:
    """Validate a config for `world_size` processes. Raises UserError if it could not train on them.

    is_first: look at the checkpoints too, whose files one rank reads for all.
    """
    _check_ranges(config)
    _check_choices(config)
    dp_degree = _check_parallelism(config, world_size)
    _check_batch(config, dp_degree)
    check_model(config)
    check_data(config.training, config.data)
    _check_validation(config)
    _check_folders(config)
    _check_checkpoint(config, world_size)
    if is_first:
        check_own(Path(config.job.dump_folder))
        _check_start(config)


def _check_ranges(config: JobConfig) -> None:
    for holds, allowed, paths in _RANGES:
        for path, value in ((path, attrgetter(path)(config)) for path in paths):
            if value is not None and not holds(value):
                raise UserError(f"--{path}", value, allowed)
    parse_skip(config.data.skip)
    training, profiling, checkpoint = config.training, config.profiling, config.checkpoint
    if training.max_wall_time is not None:
        stop.seconds(training.max_wall_time)
    total_steps = config.lr_scheduler.total_steps
    if total_steps is not None and total_steps < training.steps:
        hint = "the learning rate would be negative beyond its end"
        raise UserError("--lr_scheduler.total_steps", total_steps, f"at least training.steps {training.steps}", hint)
    if checkpoint.keep_latest_k == 1:
        raise UserError("--checkpoint.keep_latest_k", 1, "0 (keep all) or 2 or more")
    every = checkpoint.keep_every if checkpoint.enable else 0
    if every and (checkpoint.interval_type == "seconds" or every % checkpoint.interval):
        interval = f"{checkpoint.interval} {checkpoint.interval_type}"
        allowed = f"a multiple of checkpoint.interval in steps (it is {interval})"
        raise UserError("--checkpoint.keep_every", every, allowed, "there are no other checkpoints to keep")
    if training.context_len is not None and training.context_len > training.seq_len:
        allowed = f"at most training.seq_len {training.seq_len}"
        raise UserError("--training.context_len", training.context_len, allowed)
    cycle = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < cycle:
        allowed = f"{cycle} or more (profiling.profiler_warmup + profiling.profiler_active)"
        raise UserError("--profiling.profile_freq", profiling.profile_freq, allowed)


def _check_choices(config: JobConfig) -> None:
    """Reject what torchtitan would fail at later, and settings that would silently have no effect."""
    if config.fault_tolerance.enable:
        raise UserError("--fault_tolerance.enable", "true", "false", "this version does not support it")
    if config.comm.mode != "default":
        raise UserError("--comm.mode", config.comm.mode, "default", "the others do not train")
    if config.optimizer.name not in ("Adam", "AdamW"):
        raise UserError("--optimizer.name", repr(config.optimizer.name), "Adam or AdamW")
    if unknown := set(config.model.converters) - _CONVERTERS:
        raise UserError("--model.converters", min(unknown), f"among {', '.join(sorted(_CONVERTERS))}")
    if config.training.skip_nan_inf and config.optimizer.early_step_in_backward:
        hint = "the weights are updated before the gradients of the step are known"
        raise UserError("--training.skip_nan_inf", "true", "false with optimizer.early_step_in_backward", hint)
    if config.compile.enable and "model" not in config.compile.components:
        found = ", ".join(config.compile.components) or "nothing"
        raise UserError("--compile.components", found, "a list with model", "nothing else of a job is compiled")
    ac = config.activation_checkpoint
    if ac.mode == "memory_budget" and not config.compile.enable:
        raise UserError("--activation_checkpoint.mode", ac.mode, hint="it needs --compile.enable")
    if ac.selective_ac_option != "op" and not ac.selective_ac_option.isdecimal():
        allowed = "op or a whole number"
        raise UserError("--activation_checkpoint.selective_ac_option", repr(ac.selective_ac_option), allowed)
    if (module := config.experimental.custom_import) and not is_found(module):
        raise UserError("--model.import", f"no module {module}")


def _check_parallelism(config: JobConfig, world_size: int) -> int:
    """The data-parallel degree. Raises UserError for an unsupported layout, or one that `world_size` does not fit."""
    p = config.parallelism
    inner = [f"{kind}_parallel_degree" for kind in ("tensor", "pipeline", "context")]  # divide the model, not the batch
    degrees = {name: getattr(p, name) for name in (*inner, "data_parallel_replicate_degree")}
    shard = p.data_parallel_shard_degree
    for name, degree in degrees.items():
        if degree < 1:
            raise UserError(f"--parallelism.{name}", degree, "1 or more")
    if shard < 1 and shard != -1:
        raise UserError("--parallelism.data_parallel_shard_degree", shard, "-1 (all ranks) or 1 or more")
    if shard != -1:
        degrees["data_parallel_shard_degree"] = shard
    product = math.prod(degrees.values())
    if world_size % product or (shard != -1 and product != world_size):
        given = {name: degree for name, degree in degrees.items() if degree > 1 or name == "data_parallel_shard_degree"}
        allowed = f"a divisor of the {world_size} ranks" if shard == -1 else f"{world_size}, the number of ranks"
        raise UserError(f"--parallelism.{' x '.join(given)}", " x ".join(map(str, given.values())), allowed)
    inner_degree = math.prod(degrees[name] for name in inner)
    dp_degree = world_size // inner_degree
    if config.optimizer.early_step_in_backward and p.pipeline_parallel_degree > 1:
        hint = "torchtitan has none for pipelines"
        raise UserError("--optimizer.early_step_in_backward", "true", "false", hint)
    if p.pipeline_parallel_degree > 1:
        _check_microbatches(config)
    _check_experts(config, dp_degree // p.data_parallel_replicate_degree)
    return dp_degree


def _check_experts(config: JobConfig, fsdp_degree: int) -> None:
    p = config.parallelism
    expert, tensor = p.expert_parallel_degree, p.expert_tensor_parallel_degree
    if config.model.name == "auto" and (expert, tensor) != (1, 1):
        name = "expert_parallel_degree" if expert != 1 else "expert_tensor_parallel_degree"
        hint = "only the experts of torchtitan's own models (--model.name) can be divided"
        raise UserError(f"--parallelism.{name}", getattr(p, name), "1 for models of transformers and fla", hint)
    # With the other choice that torchtitan 0.2.2 has, 1, tensor ranks share tokens, and their gradient is not added up.
    if tensor != (needed := p.tensor_parallel_degree if expert > 1 else 1):
        hint = "tensor_parallel_degree where expert_parallel_degree is above 1, and else 1"
        raise UserError("--parallelism.expert_tensor_parallel_degree", tensor, str(needed), hint)
    if expert != 1 and (expert < 1 or fsdp_degree < 2 or fsdp_degree % expert):
        allowed = f"a divisor of the ranks that FSDP2 shards over, 2 or more, found {fsdp_degree}"
        raise UserError("--parallelism.expert_parallel_degree", expert, allowed)


def _check_microbatches(config: JobConfig) -> None:
    p, batch = config.parallelism, config.training.local_batch_size
    size, path = p.pipeline_parallel_microbatch_size, p.pipeline_parallel_schedule_csv
    if size < 1 or batch % size:
        allowed = f"a divisor of training.local_batch_size {batch}"
        raise UserError("--parallelism.pipeline_parallel_microbatch_size", size, allowed)
    if path and not os.path.isfile(path):
        raise UserError("--parallelism.pipeline_parallel_schedule_csv", f"no file {path}")
    for name, least in (("layers_per_stage", 1), ("first_stage_less_layers", 0), ("last_stage_less_layers", 0)):
        found = getattr(p, f"pipeline_parallel_{name}")
        if found is not None and found < least:
            raise UserError(f"--parallelism.pipeline_parallel_{name}", found, f"{least} or more")
    pipeline_schedule.validate(config)


def _check_batch(config: JobConfig, dp_degree: int) -> None:
    check_lanes(config.data, dp_degree)
    batch, local, seq_len = (getattr(config.training, n) for n in ("global_batch_size", "local_batch_size", "seq_len"))
    step = local * dp_degree
    _check_tokens("training.local_batch_size", local, seq_len)
    if batch != -1 and (batch < 1 or batch % step):
        product = f"training.local_batch_size {local} x {dp_degree} data-parallel ranks"
        allowed = f"a multiple of {product}: {near_multiples(batch, step)} would work"
        raise UserError("--training.global_batch_size", batch, allowed)
    _check_tokens("training.global_batch_size", batch, seq_len, dp_degree)


def _check_tokens(name: str, rows: int, seq_len: int, ranks: int = 1) -> None:
    if rows * seq_len > TOKENS * ranks:
        allowed = f"at most {TOKENS * ranks // seq_len} at seq_len {seq_len}"
        raise UserError(f"--{name}", rows, allowed, "a rank holds the tokens of a step in memory")


def _check_validation(config: JobConfig) -> None:
    validation, training = config.validation, config.training
    if not validation.enable:
        return
    if not validation.dataset:
        raise UserError("--validation.dataset", "nothing", "a local path or a hub id, or a comma list of them")
    check_data(validation, config.data)
    assert validation.local_batch_size and validation.seq_len, "parse sets them"
    _check_tokens("validation.local_batch_size", validation.local_batch_size, validation.seq_len)
    for name in ("local_batch_size", "seq_len"):
        found, needed = getattr(validation, name), getattr(training, name)
        if config.parallelism.pipeline_parallel_degree > 1 and found != needed:
            hint = "the stages of a pipeline take batches of one shape"
            raise UserError(f"--validation.{name}", found, f"training.{name} {needed}", hint)


def _check_folders(config: JobConfig) -> None:
    dump_folder = config.job.dump_folder
    for flag, path in (("job.dump_folder", dump_folder), ("checkpoint.folder", config.checkpoint.folder)):
        if not path or "://" in path:
            raise UserError(f"--{flag}", path or "nothing", "a folder of this machine's file system")
    if (resolved := Path(os.path.realpath(dump_folder))) == resolved.parent:
        raise UserError("--job.dump_folder", dump_folder, "a folder of the run's own")
    try:
        (absolute := os.path.abspath(dump_folder)).encode()
    except UnicodeError:
        raise UserError("--job.dump_folder", repr(absolute), "a path in UTF-8, as config.toml records it") from None
    existing = next(folder for folder in (Path(dump_folder), *Path(dump_folder).parents) if os.path.exists(folder))
    if not os.path.isdir(existing):
        raise UserError("--job.dump_folder", f"the file {existing}", "a folder")
    if not os.access(existing, os.W_OK):
        raise UserError("--job.dump_folder", existing, "writable")
    longest = os.pathconf(existing, "PC_NAME_MAX")
    for path in ("job.dump_folder", *_FOLDERS):
        name = attrgetter(path)(config)
        if any(len(os.fsencode(part)) > longest for part in name.split("/")):
            raise UserError(f"--{path}", repr(name), f"a name of at most {longest} bytes")
    for path in _FOLDERS:
        _check_inside(f"--{path}", attrgetter(path)(config), Path(dump_folder))
    exports = Path(dump_folder, "hf")
    if config.checkpoint.enable and config.checkpoint.export and exports.exists() and not exports.is_dir():
        raise UserError("--job.dump_folder", f"the file {exports}", "a folder", "--checkpoint.export writes to it")
    checkpoints = os.path.normpath(config.checkpoint.folder)
    for path in _FOLDERS[1:]:
        name = os.path.normpath(attrgetter(path)(config))
        if Path(name).is_relative_to(checkpoints):
            raise UserError(f"--{path}", name, "another folder", f"checkpoint.folder is {checkpoints}")
    if "/" in (prefix := config.comm.save_traces_file_prefix):
        raise UserError("--comm.save_traces_file_prefix", repr(prefix), "without /")


def _check_inside(flag: str, name: str, run: Path) -> None:
    """Raises UserError unless a name is that of a folder in the run folder which the run does not use otherwise."""
    path = os.path.normpath(name)
    first = path.split("/")[0]
    if first in ("", ".", ".."):
        raise UserError(flag, repr(name), "a folder inside job.dump_folder")
    if first in FILES:
        raise UserError(flag, path, "another folder", f"a run has its own {first} there")
    existing = next(folder for folder in (run / path, *(run / path).parents) if os.path.lexists(folder))
    if os.path.exists(existing) and not os.path.isdir(existing):  # a broken link may be a disk that is not mounted
        raise UserError(flag, f"the file {existing}", "a folder")


def _check_checkpoint(config: JobConfig, world_size: int) -> None:
    checkpoint = config.checkpoint
    seed, from_hf = checkpoint.create_seed_checkpoint, checkpoint.initial_load_in_hf
    if checkpoint.last_save_in_hf:
        raise UserError("--checkpoint.last_save_in_hf", "true", "false", "--checkpoint.export writes hf/step-N")
    if from_hf and not checkpoint.initial_load_path:
        hint = "initial_load_in_hf loads it"
        raise UserError("--checkpoint.initial_load_path", "nothing", "a folder or hub id", hint)
    if from_hf and not checkpoint.initial_load_model_only:
        raise UserError("--checkpoint.initial_load_model_only", "false", "true for Hugging Face weights")
    if unknown := set(checkpoint.exclude_from_loading) - set(_EXCLUDABLE):
        raise UserError("--checkpoint.exclude_from_loading", min(unknown), f"among {', '.join(_EXCLUDABLE)}")
    if seed and world_size != 1:
        allowed = "one process (NNODE=1 NGPU=1)"
        raise UserError("--checkpoint.create_seed_checkpoint", f"{world_size} processes", allowed)
    if seed and not checkpoint.enable:
        raise UserError("--checkpoint.enable", "false", "true with create_seed_checkpoint")
    if seed and (path := checkpoint.initial_load_path):
        raise UserError("--checkpoint.initial_load_path", path, "none with create_seed_checkpoint")


def _check_start(config: JobConfig) -> None:
    """Look at the checkpoints of the run, and at what it starts from."""
    checkpoint, dump = config.checkpoint, Path(config.job.dump_folder)
    start = plan_start(config)
    check_places(config, start)
    if start.mode != "resume":
        check_orphaned_checkpoints(checkpoint, dump)
    if start.mode == "init" and checkpoint.initial_load_in_hf:
        from flame.convert.hf_weights import check_folder  # here: it imports numpy

        assert checkpoint.initial_load_path
        check_folder(checkpoint.initial_load_path, may_download=config.model.name == "auto")
    if checkpoint.create_seed_checkpoint and start.mode == "resume":
        hint = f"{dump / checkpoint.folder} holds checkpoints already"
        raise UserError("--checkpoint.create_seed_checkpoint", "true", "false", hint)
