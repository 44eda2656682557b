"""Spellings of flame 0.x and LLMonade, as flags and as TOML keys, and what each one is called today.

One table, read by `flame.config.parser`. A row says which type the old value has, which setting of today it gives, and
the sentence a user is told when it gives none. A value that needs other settings is a `Later`: a function of the whole
config and the world size, called once everything the user typed has been placed.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flame.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Later:
    """A value of today's setting that depends on the rest of the config: `compute(config, world_size)`."""

    compute: Callable[[Any, int], Any]


@dataclass(frozen=True)
class Old:
    """One older spelling.

    It holds a value of type `kind` (None: the type of today's setting) and gives the setting `to`, or what `change`
    makes of the value, {path: value or Later}; `change` raises UserError for what can no longer be honoured.
    `ignored` is the reason an accepted spelling changes nothing. `unless_given` are the older defaults that come with
    the spelling wherever the user sets nothing else.
    """

    to: str = ""
    kind: Any = None
    change: Callable[[Any], dict[str, Any]] | None = None
    ignored: str = ""
    unless_given: dict[str, Any] = field(default_factory=dict)

    def targets(self, value: Any) -> dict[str, Any]:
        """{today's path: value or Later} for an old value of the right type."""
        if self.change:
            return self.change(value)
        return {self.to: value} if self.to else {}


def _scheduler(name: str) -> dict[str, Any]:
    """lr_scheduler.decay_type; wsd is sqrt with a decay_ratio of 0.1 - warmup_steps / steps"""
    if name != "wsd":
        return {"lr_scheduler.decay_type": name, "lr_scheduler.decay_ratio": None}
    return {"lr_scheduler.decay_type": "sqrt", "lr_scheduler.decay_ratio": Later(_wsd_decay_ratio)}


def _wsd_decay_ratio(config: Any, world_size: int) -> float:
    # The older curve was stable for 0.9 of all steps *after* warm-up, so warm-up came out of the last tenth.
    steps = config.lr_scheduler.total_steps or config.training.steps
    return max(0.0, 0.1 - config.lr_scheduler.warmup_steps / max(1, steps))


def _global_batch_size(accumulation: int) -> dict[str, Any]:
    """training.global_batch_size = local_batch_size x this x data-parallel ranks"""

    def compute(config: Any, world_size: int) -> int:
        parallel = config.parallelism
        model = parallel.tensor_parallel_degree * parallel.pipeline_parallel_degree * parallel.context_parallel_degree
        return config.training.local_batch_size * accumulation * max(1, world_size // max(1, model))

    if accumulation < 1:
        raise UserError(f"found {accumulation}, must be 1 or more")
    return {"training.global_batch_size": Later(compute)}


def _microbatch_size(count: int) -> dict[str, Any]:
    """parallelism.pipeline_parallel_microbatch_size = local_batch_size / this"""

    def compute(config: Any, world_size: int) -> int:
        batch = config.training.local_batch_size
        if count < 1 or batch % count:
            raise UserError(f"{count} microbatches do not divide training.local_batch_size {batch}")
        return batch // count

    return {"parallelism.pipeline_parallel_microbatch_size": Later(compute)}


def _model_parts(points: list[str]) -> dict[str, Any]:
    """parallelism.module_fqns_per_model_part, for the layers of model.config"""

    def compute(config: Any, world_size: int) -> list[list[str]]:
        layers = _layer_count(config.model.config)
        names = ["tok_embeddings", *(f"layers.{i}" for i in range(layers)), "norm", "output"]
        if unknown := [p for p in points if p not in names[1:]]:
            raise UserError(f"{unknown[0]!r} is not a place to split, choose from layers.0 ... layers.{layers - 1}")
        starts = sorted({names.index(p) for p in points})
        return [names[a:b] for a, b in zip([0, *starts], [*starts, len(names)], strict=True)]

    return {"parallelism.module_fqns_per_model_part": Later(compute)} if points else {}


def _layer_count(model_config: str | None) -> int:
    """Number of blocks a local model JSON describes; UserError if it cannot be read off."""
    path = Path(model_config or "").expanduser()
    path = path / "config.json" if os.path.isdir(path) else path
    try:
        described = json.loads(path.read_text())
        return int(described.get("num_hidden_layers") or described["n_layer"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"needs the number of layers from a local model JSON, model.config is {model_config}") from None


def _float8(on: bool) -> dict[str, Any]:
    """model.converters gets quantize.linear.float8"""

    def compute(config: Any, world_size: int) -> list[str]:
        converters = config.model.converters
        return converters if "quantize.linear.float8" in converters else [*converters, "quantize.linear.float8"]

    return {"model.converters": Later(compute)} if on else {}


def _fused(on: bool) -> dict[str, Any]:
    """optimizer.implementation = fused; false is foreach"""
    return {"optimizer.implementation": "fused" if on else "foreach"}


def _rank_0_only(on: bool) -> dict[str, Any]:
    """metrics.save_for_all_ranks, inverted"""
    return {"metrics.save_for_all_ranks": not on}


def _scaling_type(name: str) -> dict[str, Any]:
    """dynamic changes nothing, delayed is refused"""
    if name == "delayed":
        raise UserError("delayed scaling is gone from torchao, only dynamic is left")
    return {}


def _no_activation_offload(name: str) -> dict[str, Any]:
    """none changes nothing, the rest is refused"""
    if name != "none":
        raise UserError(f"activation offload is not supported (found {name!r}), only none is allowed")
    return {}


_DYNAMIC_ONLY = Old(
    kind=Literal["dynamic", "delayed"], change=_scaling_type, ignored="float8 scaling is always dynamic"
)

TABLE: dict[str, Old] = {
    "job.print_args": Old("job.print_config"),
    "job.use_for_integration_test": Old(kind=bool, ignored="there is no such test list any more"),
    "model.norm_type": Old(
        kind=Literal["layernorm", "np_layernorm", "rmsnorm", "fused_rmsnorm"],
        ignored="the model JSON decides the norm",
    ),
    # Four settings of today are rows too, as they say in another way what a second one holds: torchtitan's name of the
    # tokenizer folder, accumulation, which torchtitan knows as a global batch, `import`, which is no field's name, and
    # --dry_run, which needs no section.
    "dry_run": Old("job.dry_run"),
    "model.import": Old("experimental.custom_import"),
    "model.hf_assets_path": Old("model.tokenizer_path"),
    "optimizer.fused": Old(kind=bool, change=_fused),
    "optimizer.min_lr_ratio": Old("lr_scheduler.min_lr_factor"),
    "optimizer.scheduler": Old(
        kind=Literal["wsd", "cosine", "linear"],
        change=_scheduler,
        unless_given={"lr_scheduler.min_lr_factor": 0.1},
    ),
    "lr_scheduler.lr_min": Old("lr_scheduler.min_lr_factor"),
    "training.batch_size": Old("training.local_batch_size"),
    "training.compile": Old("compile.enable"),
    "training.data_parallel_replicate_degree": Old("parallelism.data_parallel_replicate_degree"),
    "training.data_parallel_shard_degree": Old("parallelism.data_parallel_shard_degree"),
    "training.deterministic": Old("debug.deterministic"),
    "training.disable_loss_parallel": Old("parallelism.disable_loss_parallel"),
    "training.fsdp_reshard_after_forward": Old("parallelism.fsdp_reshard_after_forward"),
    "training.gradient_accumulation_steps": Old(kind=int, change=_global_batch_size),
    "training.num_workers": Old("training.dataloader.num_workers"),
    "training.persistent_workers": Old("training.dataloader.persistent_workers"),
    "training.pin_memory": Old("training.dataloader.pin_memory"),
    "training.prefetch_factor": Old("training.dataloader.prefetch_factor"),
    "training.seed": Old("debug.seed"),
    "training.tensor_parallel_degree": Old("parallelism.tensor_parallel_degree"),
    "training.warmup_steps": Old("lr_scheduler.warmup_steps"),
    "metrics.rank_0_only": Old(kind=bool, change=_rank_0_only),
    "experimental.context_parallel_degree": Old("parallelism.context_parallel_degree"),
    "experimental.context_parallel_rotate_method": Old("parallelism.context_parallel_rotate_method"),
    "experimental.custom_model_path": Old("experimental.custom_import"),
    "experimental.enable_async_tensor_parallel": Old("parallelism.enable_async_tensor_parallel"),
    "experimental.enable_compiled_autograd": Old(kind=bool, ignored="torchtitan 0.2.2 has no compiled autograd"),
    "experimental.pipeline_parallel_degree": Old("parallelism.pipeline_parallel_degree"),
    "experimental.pipeline_parallel_microbatches": Old(kind=int, change=_microbatch_size),
    "experimental.pipeline_parallel_schedule": Old("parallelism.pipeline_parallel_schedule"),
    "experimental.pipeline_parallel_schedule_csv": Old("parallelism.pipeline_parallel_schedule_csv"),
    "experimental.pipeline_parallel_split_points": Old(kind=list[str], change=_model_parts),
    "checkpoint.enable_checkpoint": Old("checkpoint.enable", unless_given={"checkpoint.keep_latest_k": 0}),
    "checkpoint.initial_load_model_weights_only": Old("checkpoint.initial_load_model_only"),
    "checkpoint.last_save_model_weights_only": Old("checkpoint.last_save_model_only"),
    "checkpoint.model_weights_only": Old("checkpoint.last_save_model_only"),
    "activation_offload.mode": Old(kind=str, change=_no_activation_offload, ignored="there is nothing to switch off"),
    "float8.enable_float8_linear": Old(kind=bool, change=_float8),
    "float8.enable_fsdp_float8_all_gather": Old("quantize.linear.float8.enable_fsdp_float8_all_gather"),
    "float8.filter_fqns": Old("quantize.linear.float8.filter_fqns"),
    "float8.force_recompute_fp8_weight_in_bwd": Old(kind=bool, ignored="torchao decides this itself"),
    "float8.precompute_float8_dynamic_scale_for_fsdp": Old(
        "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp"
    ),
    "float8.recipe_name": Old("quantize.linear.float8.recipe_name"),
    "float8.scaling_type_grad_output": _DYNAMIC_ONLY,
    "float8.scaling_type_input": _DYNAMIC_ONLY,
    "float8.scaling_type_weight": _DYNAMIC_ONLY,
    "memory_estimation.enabled": Old("memory_estimation.enable"),
}

# Settings that kept their name while one of their values got another: {path: {old value: today's}}.
VALUES: dict[str, dict[str, str]] = {
    "checkpoint.interval_type": {"step": "steps"},
    "model.converters": {"float8": "quantize.linear.float8", "mx": "quantize.linear.mx"},
    "model.name": {"fla": "auto"},
}

_JOB_FILES = ("train.toml", "flame/models/fla.toml", "llmonade/models/llmon.toml")


def rename_value(path: str, value: Any) -> Any:
    """Today's spelling of a setting's value (of each item, for a list or a comma list); others pass unchanged."""
    names = VALUES.get(path)
    if names and isinstance(value, list | tuple):
        return type(value)(rename_value(path, item) for item in value)
    if names and isinstance(value, str):
        return ",".join(names.get(item, item) for item in value.split(","))
    return value


def shipped_file(path: str) -> str:
    """The file of this repository that a path of the older systems means, if nothing is at that path; else the path."""
    if os.path.exists(os.path.expanduser(path)):
        return path
    name = path.removeprefix("./")
    name = "configs/jobs/pretrain.toml" if name in _JOB_FILES else name.removeprefix("llmonade/")
    ours = REPOSITORY / name
    return str(ours) if name.startswith("configs/") and ours.is_file() else path
