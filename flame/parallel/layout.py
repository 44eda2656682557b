"""Which layouts a model can be trained in, checked before a process group exists, and which modules each stage gets."""

from typing import Any, Literal

import torch.nn as nn
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.pipeline_parallel import generate_llm_fqn_per_model_part
from torchtitan.tools.utils import device_type

from flame.config.schema import JobConfig
from flame.errors import UserError
from flame.models.family import Family
from flame.parallel import pipeline_schedule

TP_FLAG, PP_FLAG, CP_FLAG = (f"--parallelism.{kind}_parallel_degree" for kind in ("tensor", "pipeline", "context"))
ASYNC_TP_FLAG = "--parallelism.enable_async_tensor_parallel"
KEPT_BYTES = 2**30  # a model of this size stays gathered between forward and backward


def validate(family: Family, config: Any, model: nn.Module, job_config: JobConfig) -> None:
    """Check a job's layout against a model, transformers' own on the meta device.

    Raises UserError if TP, CP or PP cannot divide the model or its sequences, or cannot be combined with an option.
    """
    layout = job_config.parallelism
    if layout.tensor_parallel_degree * layout.context_parallel_degree > 1:
        _validate_division(family, config, model, job_config)
    _validate_compile(job_config)
    if layout.pipeline_parallel_degree > 1:
        _validate_pipeline(family, config, job_config)


def _validate_division(family: Family, config: Any, model: Any, job_config: JobConfig) -> None:
    layout, plan = job_config.parallelism, family.tp_plan
    tensor, context = layout.tensor_parallel_degree, layout.context_parallel_degree
    degree, flag = tensor * context, TP_FLAG if tensor > 1 else CP_FLAG
    product = f"{degree} (tensor_parallel_degree {tensor} x context_parallel_degree {context})"
    if isinstance(plan, str):
        raise UserError(flag, degree, f"1 for {config.model_type}", plan)
    for name, required in plan.requires.items():
        if getattr(config, name) != required:
            hint = f"its heads can be divided only where {name} is {required}"
            raise UserError(flag, degree, f"1 for this {config.model_type}", hint)
    attn = getattr(config, "attn", None) or []
    for fields in (vars(config), *(attn if isinstance(attn, list) else [attn])):
        for name in plan.must_divide:
            if (heads := fields.get(name)) and heads % degree:
                raise UserError(flag, product, f"a divisor of the model's {name}, {heads}")
    if tensor > 1:
        sizes = {"vocab_size": config.vocab_size}
        for block in getattr(model.base_model, family.blocks):
            for name, parameter in block.named_parameters():
                if (dim := plan.shard_dim(name)) is not None:
                    sizes[f"{name} (dimension {dim})"] = parameter.shape[dim]
        for name, size in sizes.items():
            if size % tensor:
                raise UserError(TP_FLAG, tensor, f"a divisor of the model's {name}, {size}")
    for section in ("training", "validation") if job_config.validation.enable else ("training",):
        if (seq_len := getattr(job_config, section).seq_len) % degree:
            raise UserError(f"--{section}.seq_len", seq_len, f"a multiple of {product}")


def compiles(family: Family, job_config: JobConfig) -> bool:
    """Whether blocks are compiled: as the job says, else on a GPU if the family gains and nothing excludes it."""
    layout, asked = job_config.parallelism, job_config.compile.enable
    if asked is not None:
        return asked
    recomputes_shards = layout.tensor_parallel_degree > 1 and job_config.activation_checkpoint.mode != "none"
    return (
        device_type == "cuda"
        and family.compiles
        and "model" in job_config.compile.components
        and not recomputes_shards
        and layout.pipeline_parallel_degree == 1  # compiled stages were not rehearsed
        and not job_config.quantize.linear.float8.emulate
    )


def _validate_compile(job_config: JobConfig) -> None:
    tensor, mode = job_config.parallelism.tensor_parallel_degree, job_config.activation_checkpoint.mode
    if tensor > 1 and mode != "none" and job_config.compile.enable:
        # torch 2.13 takes the mesh of a parameter for one of the tensors that a compiled block keeps for it.
        rule, hint = f"none with --compile.enable and {TP_FLAG} {tensor}", "compiled DTensors cannot be recomputed"
        raise UserError("--activation_checkpoint.mode", mode, rule, hint)
    compiled = job_config.compile.enable and job_config.compile.backend == "inductor"
    if job_config.parallelism.enable_async_tensor_parallel and not (compiled and tensor > 1):
        needed = f"{TP_FLAG} of 2 or more, --compile.enable and --compile.backend inductor"
        raise UserError(ASYNC_TP_FLAG, "true", f"false without {needed}", "it is a pass of torch.compile over TP")


def _validate_pipeline(family: Family, config: Any, job_config: JobConfig) -> None:
    layout, layer_types = job_config.parallelism, set(getattr(config, "layer_types", None) or [])
    reasons = {
        f"{config.model_type} has no stages: {family.stages}": family.stages is not True,
        f"{config.model_type} has no row in flame.models.table": not family.fused_loss,
        "both ends would share tied embeddings (tie_word_embeddings)": getattr(config, "tie_word_embeddings", False),
        "the balance loss (output_router_logits) spans stages": getattr(config, "output_router_logits", False),
        "stages count their blocks anew, which mixes up several kinds (layer_types)": len(layer_types) > 1,
    }
    if reason := next((reason for reason, applies in reasons.items() if applies), None):
        raise _no_pipeline(layout, reason)
    pipeline_schedule.validate_csv(job_config, len(stages(config.num_hidden_layers, layout)))


def _no_pipeline(layout: Any, reason: str) -> UserError:
    return UserError(PP_FLAG, layout.pipeline_parallel_degree, "1", reason)


def dp_degree(layout: Any, world_size: int) -> int:
    """The number of ranks that read data of their own."""
    tensor, context = layout.tensor_parallel_degree, layout.context_parallel_degree
    return world_size // (tensor * context * layout.pipeline_parallel_degree)


def uses_fsdp(job_config: JobConfig, world_size: int) -> bool:
    """Whether FSDP2 holds the parameters. It does not where it has nothing to reduce, to cast or to offload."""
    training, degree = job_config.training, job_config.parallelism.context_parallel_degree
    many = dp_degree(job_config.parallelism, world_size) * degree > 1
    return many or {training.dtype, training.mixed_precision_param} != {"float32"} or training.enable_cpu_offload


def fsdp_degree(layout: Any, world_size: int) -> int:
    """The number of ranks over which FSDP2 shards each parameter."""
    return dp_degree(layout, world_size) * layout.context_parallel_degree // layout.data_parallel_replicate_degree


def reshard_policy(job_config: JobConfig, shards: int, parameters: int) -> Literal["default", "always", "never"]:
    """`fsdp_reshard_after_forward` for torchtitan: "default" becomes "never" where resharding frees little or nothing.

    shards: ranks over which FSDP2 shards each parameter; parameters: of the whole model, all its stages and TP ranks.
    """
    layout, dtype = job_config.parallelism, TORCH_DTYPE_MAP[job_config.training.mixed_precision_param]
    if layout.fsdp_reshard_after_forward != "default":
        return layout.fsdp_reshard_after_forward
    small = parameters * dtype.itemsize <= KEPT_BYTES
    # Of one shard nothing is gathered, and the backward would cast again. A pipeline would gather each microbatch.
    return "never" if small or shards == 1 or layout.pipeline_parallel_degree > 1 else "default"


def module_fqns(num_layers: int) -> list[str]:
    """torchtitan's names of a model's modules, in their order."""
    return ["tok_embeddings", *(f"layers.{i}" for i in range(num_layers)), "norm", "output"]


def stages(num_layers: int, layout: Any) -> list[list[str]]:
    """The modules of each pipeline stage, as torchtitan's pipeline_llm chooses them.

    Raises UserError if the schedule cannot run so many stages, if modules are missing, repeated or out of order, or if
    a stage has no block.
    """
    schedule = pipeline_schedule.get_schedule(layout)
    first, last = (getattr(layout, f"pipeline_parallel_{edge}_stage_less_layers") for edge in ("first", "last"))
    degree, named = layout.pipeline_parallel_degree, layout.module_fqns_per_model_part
    size, number = layout.pipeline_parallel_layers_per_stage, degree * (schedule.stages_per_rank or 2)
    setting = ""
    if named is not None:
        setting, number = "module_fqns_per_model_part", len(named)
    elif size is not None:
        setting, number = f"pipeline_parallel_layers_per_stage {size}", -(-(num_layers + first + last) // size)
    per_rank, rest = divmod(number, degree)
    if rest or (per_rank != schedule.stages_per_rank if schedule.stages_per_rank else per_rank < 2):
        needed = {None: "two or more", 1: "one", 2: "two"}[schedule.stages_per_rank]
        raise _no_pipeline(layout, f"{setting} makes {number} stages, {schedule.name} needs {needed} per rank")
    try:
        found = named or generate_llm_fqn_per_model_part(number, num_layers, first, last)
    except ValueError as error:
        raise _no_pipeline(layout, str(error).split(". ")[0]) from None
    names, whole = [name for stage in found for name in stage], module_fqns(num_layers)
    if names != whole:
        wrong = [name for name in whole if names.count(name) != 1] + [name for name in names if name not in whole]
        ordered = f"its stages must have {', '.join(whole)}, each once, in this order"
        raise _no_pipeline(layout, f"{ordered}; see {(wrong or names)[0]}")
    for stage, names in enumerate(found, 1):
        if not any(name.startswith("layers.") for name in names):
            raise _no_pipeline(layout, f"stage {stage} would have none of the model's {num_layers} blocks")
    return found
