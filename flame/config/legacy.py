"""Spellings of flame 0.x, LLMonade and torchtitan, as flags and as TOML keys, and the settings they are today.

`translate` is a pass before parsing. A row of RENAMED names today's setting; a row of CHANGED computes today's settings
from the older value, or says why the spelling changes nothing.
"""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from flame.config.files import read_json
from flame.config.schema import JobConfig
from flame.config.setting import Layer, Setting, resolve_negation, typed
from flame.errors import UserError

logger = logging.getLogger("flame")

# A value that depends on other settings: called with the config that has all of those, and the world size.
Computed = Callable[[JobConfig, int], Any]


@dataclass(frozen=True)
class Old:
    """An older spelling whose value, of type `kind`, is not a value of one of today's settings.

    change: returns those settings, {path: value or Computed}, and raises UserError for a value that is no longer
    supported; its docstring stands in docs/flags.md. ignored: why the spelling changes nothing, which is logged.
    """

    kind: Any
    change: Callable[[Any], dict[str, Any]] = lambda _: {}
    ignored: str = ""


def _scheduler(name: str) -> dict[str, Any]:
    """lr_scheduler.decay_type; wsd is sqrt with a decay_ratio of 0.1 - warmup_steps / steps"""

    def wsd_decay_ratio(config: JobConfig, world_size: int) -> float:
        # The older curve was stable for 0.9 of all steps *after* warm-up, so warm-up came out of the last tenth.
        steps = config.lr_scheduler.total_steps or config.training.steps
        return max(0.0, 0.1 - config.lr_scheduler.warmup_steps / max(1, steps))

    if name != "wsd":
        return {"lr_scheduler.decay_type": name, "lr_scheduler.decay_ratio": None}
    return {"lr_scheduler.decay_type": "sqrt", "lr_scheduler.decay_ratio": wsd_decay_ratio}


def _global_batch_size(accumulation: int) -> dict[str, Any]:
    """training.global_batch_size = local_batch_size x this x data-parallel ranks"""

    def compute(config: JobConfig, world_size: int) -> int:
        parallel = config.parallelism
        model = parallel.tensor_parallel_degree * parallel.pipeline_parallel_degree * parallel.context_parallel_degree
        return config.training.local_batch_size * accumulation * max(1, world_size // max(1, model))

    if accumulation < 1:
        raise UserError("", accumulation, "1 or more")
    return {"training.global_batch_size": compute}


def _microbatch_size(count: int) -> dict[str, Any]:
    """parallelism.pipeline_parallel_microbatch_size = local_batch_size / this"""

    def compute(config: JobConfig, world_size: int) -> int:
        batch = config.training.local_batch_size
        if count < 1 or batch % count:
            raise UserError("", count, f"a divisor of training.local_batch_size {batch}")
        return batch // count

    return {"parallelism.pipeline_parallel_microbatch_size": compute}


def _model_parts(points: list[str]) -> dict[str, Any]:
    """parallelism.module_fqns_per_model_part, for the layers of model.config"""

    def compute(config: JobConfig, world_size: int) -> list[list[str]]:
        layers = _layer_count(config.model.config)
        names = ["tok_embeddings", *(f"layers.{i}" for i in range(layers)), "norm", "output"]
        if unknown := [p for p in points if p not in names[1:]]:
            raise UserError("", repr(unknown[0]), f"among layers.0 ... layers.{layers - 1}, norm and output")
        starts = sorted({names.index(p) for p in points})
        return [names[a:b] for a, b in zip([0, *starts], [*starts, len(names)], strict=True)]

    return {"parallelism.module_fqns_per_model_part": compute} if points else {}


def _layer_count(model_config: str | None) -> int:
    """The number of blocks that a local model JSON describes. Raises UserError if it cannot be read there."""
    path = Path(os.path.expanduser(model_config or ""))
    path = path / "config.json" if os.path.isdir(path) else path
    try:
        described = read_json(path)
        return int(described.get("num_hidden_layers") or described["n_layer"])
    except (OSError, ValueError, KeyError, TypeError):
        hint = f"needs model.config to be a local model JSON with a number of layers, found {model_config}"
        raise UserError("", hint=hint) from None


def _float8(on: bool) -> dict[str, Any]:
    """model.converters gets quantize.linear.float8"""

    def compute(config: JobConfig, world_size: int) -> list[str]:
        converters = config.model.converters
        return converters if "quantize.linear.float8" in converters else [*converters, "quantize.linear.float8"]

    return {"model.converters": compute} if on else {}


def _fused(on: bool) -> dict[str, Any]:
    """optimizer.implementation = fused; false is foreach"""
    return {"optimizer.implementation": "fused" if on else "foreach"}


def _rank_0_only(on: bool) -> dict[str, Any]:
    """metrics.save_for_all_ranks, inverted"""
    return {"metrics.save_for_all_ranks": not on}


def _only(allowed: str, hint: str) -> Callable[[Any], dict[str, Any]]:
    """The change of a spelling that has one value left, which changes nothing."""

    def change(value: Any) -> dict[str, Any]:
        found = value if isinstance(value, str) else str(value).lower()
        if found not in ("", allowed):
            raise UserError("", found, allowed, hint)
        return {}

    change.__doc__ = f"only {allowed}: {hint}"
    return change


def _moved(older: str, today: str, names: str) -> dict[str, str]:
    return {f"{older}.{name}": f"{today}.{name}" for name in names.split()}


RENAMED: dict[str, str] = {
    # Second spellings of settings of today; `import` cannot name a field.
    "dry_run": "job.dry_run",
    "memory_estimation.enable": "job.dry_run",
    "model.import": "experimental.custom_import",
    "model.hf_assets_path": "model.tokenizer_path",
    # Older names.
    "job.print_args": "job.print_config",
    "optimizer.min_lr_ratio": "lr_scheduler.min_lr_factor",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "training.batch_size": "training.local_batch_size",
    "training.compile": "compile.enable",
    "experimental.custom_model_path": "experimental.custom_import",
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.initial_load_model_weights_only": "checkpoint.initial_load_model_only",
    "checkpoint.last_save_model_weights_only": "checkpoint.last_save_model_only",
    "checkpoint.model_weights_only": "checkpoint.last_save_model_only",
    "memory_estimation.enabled": "job.dry_run",
    **_moved("training", "debug", "deterministic seed"),
    **_moved("training", "lr_scheduler", "warmup_steps"),
    **_moved("training", "training.dataloader", "num_workers persistent_workers pin_memory prefetch_factor"),
    **_moved("training", "parallelism", "data_parallel_replicate_degree data_parallel_shard_degree"),
    **_moved("training", "parallelism", "disable_loss_parallel fsdp_reshard_after_forward tensor_parallel_degree"),
    **_moved("experimental", "parallelism", "context_parallel_degree context_parallel_rotate_method"),
    **_moved("experimental", "parallelism", "enable_async_tensor_parallel pipeline_parallel_degree"),
    **_moved("experimental", "parallelism", "pipeline_parallel_schedule pipeline_parallel_schedule_csv"),
    **_moved("float8", "quantize.linear.float8", "enable_fsdp_float8_all_gather filter_fqns recipe_name"),
    **_moved("float8", "quantize.linear.float8", "precompute_float8_dynamic_scale_for_fsdp"),
}

_DYNAMIC_ONLY = Old(
    Literal["dynamic", "delayed"], _only("dynamic", "torchao has no other"), "float8 scaling is always dynamic"
)

CHANGED: dict[str, Old] = {
    "training.gradient_accumulation_steps": Old(int, _global_batch_size),
    # torchtitan's settings that have no meaning here.
    "training.dataset_path": Old(str | None, _only("none", "give the path to training.dataset")),
    "validation.dataset_path": Old(str | None, _only("none", "give the path to validation.dataset")),
    "checkpoint.initial_load_in_hf_quantized": Old(bool, _only("false", "quantized weights are not supported")),
    # Those of the older systems.
    "job.use_for_integration_test": Old(bool, ignored="there is no such test list any more"),
    "model.norm_type": Old(
        Literal["layernorm", "np_layernorm", "rmsnorm", "fused_rmsnorm"], ignored="the model JSON decides the norm"
    ),
    "optimizer.fused": Old(bool, _fused),
    "optimizer.scheduler": Old(Literal["wsd", "cosine", "linear"], _scheduler),
    "metrics.rank_0_only": Old(bool, _rank_0_only),
    "experimental.enable_compiled_autograd": Old(bool, ignored="torchtitan 0.2.2 has no compiled autograd"),
    "experimental.pipeline_parallel_microbatches": Old(int, _microbatch_size),
    "experimental.pipeline_parallel_split_points": Old(list[str], _model_parts),
    "activation_offload.mode": Old(str, _only("none", "offload is not supported"), "there is nothing to switch off"),
    "float8.enable_float8_linear": Old(bool, _float8),
    "float8.force_recompute_fp8_weight_in_bwd": Old(bool, ignored="torchao decides this itself"),
    "float8.scaling_type_grad_output": _DYNAMIC_ONLY,
    "float8.scaling_type_input": _DYNAMIC_ONLY,
    "float8.scaling_type_weight": _DYNAMIC_ONLY,
}

# Older defaults that come with a spelling, where neither the TOML nor a flag gives the setting.
UNLESS_GIVEN: dict[str, dict[str, Any]] = {
    "optimizer.scheduler": {"lr_scheduler.min_lr_factor": 0.1},
    "checkpoint.enable_checkpoint": {"checkpoint.keep_latest_k": 0},
}

# Settings that kept their name while one of their values got another: {path: {old value: today's}}.
VALUES: dict[str, dict[str, str]] = {
    "checkpoint.interval_type": {"step": "steps"},
    "model.converters": {"float8": "quantize.linear.float8", "mx": "quantize.linear.mx"},
    "model.name": {"fla": "auto"},
}

_JOB_FILES = ("train.toml", "flame/models/fla.toml", "llmonade/models/llmon.toml")


def translate(settings: list[Setting]) -> list[Setting]:
    """Settings under today's names with today's values, some of them Computed, and the older defaults that come along.

    Logs what is ignored. Raises UserError for values that are no longer supported.
    """
    spellings = {*RENAMED, *CHANGED}
    return [new for setting in settings for new in _translate(resolve_negation(setting, spellings))]


def _translate(setting: Setting) -> Iterator[Setting]:
    if setting.path in RENAMED:
        yield replace(setting, path=RENAMED[setting.path], older=setting.path)
    elif old := CHANGED.get(setting.path):
        try:
            changed = old.change(typed(setting, old.kind))
        except UserError as error:
            raise error.at(setting.where) from None
        for path, value in changed.items():
            yield Setting(path, setting.where, value, setting.layer, older=setting.path)
        if old.ignored:
            _log(f"{setting.where} is ignored: {old.ignored}")
    else:
        yield _replace_file(replace(setting, value=_rename_value(setting.path, setting.value)))
    for path, value in UNLESS_GIVEN.get(setting.path, {}).items():
        yield Setting(path, setting.where, value, Layer.OLDER_DEFAULT)


def log_job_file(older: Setting, brought: list[Setting], given: list[Setting]) -> None:
    """Say that a job file of the older systems is not there, what took its place, and what that brought."""
    paths = {setting.path for setting in given}
    new = ", ".join(f"{s.path} {s.value}" for s in brought if s.path not in paths and not callable(s.value))
    _log(f"{older.where}: there is no {older.older} here, using {older.value}, which sets {new or 'nothing else'}")


def _replace_file(setting: Setting) -> Setting:
    """A path of the older systems with nothing there becomes our file, the older one that it came from."""
    value = setting.value
    is_file = setting.path in ("job.config_file", "model.config") and isinstance(value, str)
    if not is_file or os.path.exists(os.path.expanduser(value)):
        return setting
    name = value.removeprefix("./")
    name = "configs/jobs/pretrain.toml" if name in _JOB_FILES else name.removeprefix("llmonade/")
    ours = Path(__file__).resolve().parents[2] / name
    if not (name.startswith("configs/") and ours.is_file()):
        return setting
    if setting.path != "job.config_file":  # log_job_file says it of that
        _log(f"{setting.where}: there is no {value} here, using {ours}")
    return replace(setting, value=str(ours), older=value)


def _rename_value(path: str, value: Any) -> Any:
    """Today's spelling of a setting's value (of each item, for a list or a comma list); others pass unchanged."""
    names = VALUES.get(path)
    if names and isinstance(value, list | tuple):
        return type(value)(_rename_value(path, item) for item in value)
    if names and isinstance(value, str):
        return ",".join(names.get(item, item) for item in value.split(","))
    return value


def _log(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # once per run, not once per process
        logger.warning(line)
