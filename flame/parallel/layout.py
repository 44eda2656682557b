"""Which layouts a model can be trained in: `check` refuses the others in one line, before any process group exists."""

from collections.abc import Iterator
from typing import Any

import torch.nn as nn
from torchtitan.distributed.pipeline_parallel import generate_llm_fqn_per_model_part

from flame.errors import UserError
from flame.models.family import Cut, Family
from flame.parallel import pipeline_schedule

TP_FLAG, PP_FLAG, CP_FLAG = (f"--parallelism.{kind}_parallel_degree" for kind in ("tensor", "pipeline", "context"))
ASYNC_TP_FLAG = "--parallelism.enable_async_tensor_parallel"


def validate(family: Family, config: Any, model: nn.Module, job_config: Any) -> None:
    """Refuse a layout that a model (transformers' own, on the meta device) cannot have. Raises UserError."""
    layout = job_config.parallelism
    tensor, context = layout.tensor_parallel_degree, layout.context_parallel_degree
    if tensor * context > 1:
        flag = TP_FLAG if tensor > 1 else CP_FLAG
        if isinstance(family.cut, str):
            raise UserError(f"{flag}: found {tensor * context}, must be 1 for {config.model_type}: {family.cut}")
        _check_heads(family.cut, config, tensor, context, flag)
        if tensor > 1:
            _check_recomputation(job_config)
            _check_columns(family, config, model, tensor)
        for section in ("training", "validation") if job_config.validation.enable else ("training",):
            if (seq_len := getattr(job_config, section).seq_len) % (tensor * context):
                raise UserError(
                    f"--{section}.seq_len: found {seq_len}, must be a multiple of {tensor * context}, the ranks that "
                    "share a sequence (tensor_parallel_degree x context_parallel_degree)"
                )
    _check_async(job_config)
    if layout.pipeline_parallel_degree > 1:
        for reason in _stage_reasons(family, config, job_config):
            raise UserError(f"{PP_FLAG}: found {layout.pipeline_parallel_degree}, must be 1: {reason}")
        pipeline_schedule.validate_csv(job_config, len(stages(config.num_hidden_layers, layout)))


def _check_recomputation(job_config: Any) -> None:
    mode = job_config.activation_checkpoint.mode
    if mode != "none" and job_config.compile.enable:
        # torch 2.13 takes the mesh of a parameter for one of the tensors that a compiled block keeps for it.
        raise UserError(
            f"--activation_checkpoint.mode: found {mode}, must be none with --compile.enable and {TP_FLAG} "
            f"{job_config.parallelism.tensor_parallel_degree}: torch.compile cannot recompute blocks of DTensors"
        )


def _check_async(job_config: Any) -> None:
    layout = job_config.parallelism
    compiled = job_config.compile.enable and job_config.compile.backend == "inductor"
    if layout.enable_async_tensor_parallel and not (compiled and layout.tensor_parallel_degree > 1):
        raise UserError(
            f"{ASYNC_TP_FLAG}: found true, which is a pass of torch.compile over TP: needs {TP_FLAG} of "
            "2 or more, --compile.enable and --compile.backend inductor"
        )


def _check_heads(cut: Cut, config: Any, tensor: int, context: int, flag: str) -> None:
    for name, needed in cut.needs.items():
        if getattr(config, name) != needed:
            raise UserError(f"{flag}: {config.model_type} is divided by heads only where {name} is {needed}")
    attn = getattr(config, "attn", None) or []
    for owner in (vars(config), *(attn if isinstance(attn, list) else [attn])):
        for name in cut.divides:
            heads = owner.get(name)
            if heads and heads % (tensor * context):
                raise UserError(
                    f"{flag}: tensor_parallel_degree {tensor} x context_parallel_degree {context} must divide the "
                    f"model's {name}, {heads}"
                )


def _check_columns(family: Family, config: Any, model: Any, tensor: int) -> None:
    assert isinstance(family.cut, Cut)
    sizes = {"vocab_size": config.vocab_size}
    for block in getattr(model.base_model, family.blocks):
        for name, parameter in block.named_parameters():
            if (dim := family.cut.dimension(name)) is not None:
                sizes[f"{name} (its dimension {dim})"] = parameter.shape[dim]
    for name, size in sizes.items():
        if size % tensor:
            raise UserError(f"{TP_FLAG}: found {tensor}, must divide the model's {name}, {size}")


def _stage_reasons(family: Family, config: Any, job_config: Any) -> Iterator[str]:
    """Why a model cannot be cut into the pipeline stages asked for."""
    layout = job_config.parallelism
    if family.stages is not True:
        yield f"{config.model_type} has no stages: {family.stages}"
    if not family.fused_loss:
        yield f"{config.model_type} has no row in flame.models.table"
    if getattr(config, "tie_word_embeddings", False):
        yield "the first and the last stage would share the table of tied embeddings (tie_word_embeddings)"
    if getattr(config, "output_router_logits", False):
        yield "the routers' balance (output_router_logits) is one number over all stages"
    if len(set(getattr(config, "layer_types", None) or [None])) > 1:
        yield "blocks of several kinds (layer_types) are counted from the first of a stage"
    yield from stage_errors(config.num_hidden_layers, layout)


def stage_errors(blocks: int, layout: Any) -> Iterator[str]:
    """Why so many blocks do not make the pipeline stages asked for."""
    try:
        found = stages(blocks, layout)
    except ValueError as error:
        yield f"{error}".split(". ")[0]
        return
    names = [name for stage in found for name in stage]
    whole = module_fqns(blocks)
    if names != whole:  # as module_fqns_per_model_part has them
        wrong = [name for name in whole if names.count(name) != 1] + [name for name in names if name not in whole]
        yield f"its stages must have {', '.join(whole)}, each once, in this order; see {(wrong or names)[0]}"
    for number, stage in enumerate(found, 1):
        if not any(name.startswith("layers.") for name in stage):
            yield f"stage {number} would have none of the model's {blocks} blocks"


def dp_degree(layout: Any, ranks: int) -> int:
    """The ranks of `ranks` that read data of their own."""
    return ranks // (layout.tensor_parallel_degree * layout.context_parallel_degree * layout.pipeline_parallel_degree)


def fsdp_degree(layout: Any, ranks: int) -> int:
    """The ranks of `ranks` over which FSDP2 divides each parameter; 1: there is no FSDP2."""
    return dp_degree(layout, ranks) * layout.context_parallel_degree // layout.data_parallel_replicate_degree


def module_fqns(blocks: int) -> list[str]:
    """torchtitan's names of all modules of a model, in their order."""
    return ["tok_embeddings", *(f"layers.{i}" for i in range(blocks)), "norm", "output"]


def stages(blocks: int, layout: Any) -> list[list[str]]:
    """The modules of each pipeline stage, as torchtitan's pipeline_llm chooses them. Raises ValueError."""
    chosen = pipeline_schedule.get_schedule(layout)
    first, last = (getattr(layout, f"pipeline_parallel_{edge}_stage_less_layers") for edge in ("first", "last"))
    degree, named = layout.pipeline_parallel_degree, layout.module_fqns_per_model_part
    size, number = layout.pipeline_parallel_layers_per_stage, degree * (chosen.stages_per_rank or 2)
    asked = ""
    if named is not None:
        asked, number = "module_fqns_per_model_part", len(named)
    elif size is not None:
        asked, number = f"pipeline_parallel_layers_per_stage {size}", -(-(blocks + first + last) // size)
    on_each, rest = divmod(number, degree)
    if rest or (on_each != chosen.stages_per_rank if chosen.stages_per_rank else on_each < 2):
        needed = {None: "two or more", 1: "one", 2: "two"}[chosen.stages_per_rank]
        raise ValueError(
            f"{asked} makes {number} stages, of which {chosen.name} needs {needed} on each of {degree} ranks"
        )
    return named if named is not None else generate_llm_fqn_per_model_part(number, blocks, first, last)
