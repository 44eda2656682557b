"""The layouts of torchtitan's own models: which of them are right, and what is mended so that they are."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torchtitan.models.moe import MoE
from torchtitan.tools.utils import device_type

from flame.config.parser import world_size
from flame.errors import UserError
from flame.parallel import pipeline_schedule
from flame.parallel.apply import force_sum_reduction
from flame.parallel.layout import ASYNC_TP_FLAG, CP_FLAG, PP_FLAG, TP_FLAG, fsdp_degree, stages
from flame.parallel.sequence_parallel import redistribute, transform_hidden


def check(spec: Any, args: Any, job_config: Any) -> None:
    """Refuse what a torchtitan model (its TrainSpec, and its flavor's arguments) cannot be trained as. UserError."""
    for complaint in _complaints(spec, args, job_config):
        raise UserError(complaint)


def _complaints(spec: Any, args: Any, job_config: Any) -> Iterator[str]:
    model, training, layout = job_config.model, job_config.training, job_config.parallelism
    name, ranks, tensor = f"{model.name} {model.flavor}", world_size(), layout.tensor_parallel_degree
    attention = getattr(args, "attn_type", "sdpa")
    masked = attention != "sdpa"
    if masked and not has_right_masks(args):
        yield f"--model.flavor: found {model.flavor}, whose two kinds of masks torchtitan 0.2.2 mixes up"
    if masked != training.varlen:
        reason = "keeps documents apart" if masked else "cannot keep documents apart"
        yield f"--training.varlen: must be {str(masked).lower()} for {name}, whose attention {reason}"
    if device_type == "cpu" and attention not in ("sdpa", "flex"):
        yield f"--model.flavor: found {model.flavor}, whose {attention} attention needs a GPU, and none is visible"
    if layout.context_parallel_degree > 1:
        yield (
            f"{CP_FLAG}: found {layout.context_parallel_degree}, must be 1 for torchtitan's models: their rings need "
            "CUDA's attention kernels, on which no test of this version has run them"
        )
    if layout.enable_async_tensor_parallel:
        yield f"{ASYNC_TP_FLAG}: found true, must be false for torchtitan's models in this version"
    if (backend := layout.expert_parallel_comm_backend) != "standard":
        yield f"--parallelism.expert_parallel_comm_backend: found {backend}, must be standard in this version"
    experts = args.moe_args.num_experts if has_experts(args) else 1
    if experts % (expert := layout.expert_parallel_degree):
        yield f"--parallelism.expert_parallel_degree: found {expert}, must divide the experts of {name}, {experts}"
    if expert > 1 and job_config.optimizer.early_step_in_backward:
        yield "--optimizer.early_step_in_backward: found true, must be false where experts are divided"
    sharded = fsdp_degree(layout, ranks)
    if expert > 1 and sharded > experts and (uneven := _uneven(spec, args, job_config, sharded // expert)):
        yield (
            f"--parallelism.expert_parallel_degree: found {expert}, leaves {sharded // expert} ranks to share the "
            f"experts of a rank, which torch divides only evenly, and their size of {uneven} is not"
        )
    if tensor > 1 and job_config.compile.enable:
        yield f"{TP_FLAG}: found {tensor}, must be 1 with --compile.enable for torchtitan's models in this version"
    for size in ("n_heads", "n_kv_heads", "vocab_size"):
        if (getattr(args, size, None) or 0) % tensor:
            yield f"{TP_FLAG}: found {tensor}, must divide {size} of {name}, {getattr(args, size)}"
    if getattr(args, "enable_weight_tying", False) and ranks > layout.data_parallel_replicate_degree:
        yield (
            f"--parallelism.data_parallel_replicate_degree: must be all {ranks} ranks for {name}, whose embedding and "
            "head share one table, which torchtitan cannot divide"
        )
    for section in ("training", "validation") if job_config.validation.enable else ("training",):
        seq_len = getattr(job_config, section).seq_len
        if seq_len % (2 * tensor) or seq_len > training.seq_len:
            yield (
                f"--{section}.seq_len: found {seq_len}, must be a multiple of {2 * tensor} (2 x tensor_parallel_degree)"
                f" and at most training.seq_len {training.seq_len} for torchtitan's models"
            )
    if (degree := layout.pipeline_parallel_degree) > 1:
        if expert > 1 and pipeline_schedule.get_schedule(layout).name == "DualPipeV":
            yield f"{pipeline_schedule.SCHEDULE_FLAG}: found DualPipeV, must be another with experts divided"
        if spec.pipelining_fn is None:
            yield f"{PP_FLAG}: found {degree}, must be 1: torchtitan cannot divide {model.name} into stages"
        pipeline_schedule.validate_csv(job_config, len(stages(args.n_layers, layout)))


def _uneven(spec: Any, args: Any, job_config: Any, over: int) -> int | None:
    """A size of experts that cannot be divided by `over`: where there are more ranks than experts, FSDP2 takes the
    second dimension."""
    args, tensor = copy.deepcopy(args), job_config.parallelism.tensor_parallel_degree
    args.moe_args.use_grouped_mm = False  # which torchtitan warns of where it is not to be had
    args.update_from_config(job_config)
    with torch.device("meta"):
        named = [(name, p) for name, p in spec.model_cls(args).named_parameters() if p.ndim == 3]
    sizes = (p.shape[1] // (1 if name.endswith("w2") else tensor) for name, p in named)
    return next((size for size in sizes if size % over), None)


def has_experts(args: Any) -> bool:
    """Whether a flavor is a mixture of experts; Qwen3's dense flavors have moe_args as well."""
    return getattr(args, "moe_enabled", hasattr(args, "moe_args"))


def has_right_masks(args: Any) -> bool:
    """Whether a flavor keeps documents apart; Llama 4's are handed the masks of all kinds of layers at once."""
    return getattr(args, "attn_type", "sdpa") != "sdpa" and not getattr(args, "every_n_layers_nope", None)


def parallelize(parallelize_fn: Callable, model: nn.Module, parallel_dims: Any, job_config: Any) -> nn.Module:
    """torchtitan's own `parallelize_fn` of a model, mended."""
    if parallel_dims.tp_enabled:
        _sum_router_gradients(model, parallel_dims.get_mesh("tp"))
        _attend_to_parts(model)
    model = parallelize_fn(model, parallel_dims, job_config)
    force_sum_reduction(model)
    return model


def _sum_router_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Mend of torchtitan 0.2.2: where scores multiply what experts give back, each tensor rank has its part of that, so
    a part of the scores' gradient, and these parts were never added up."""
    for module in model.modules():
        if isinstance(module, MoE) and not module.score_before_experts:
            transform_hidden(
                module.router, after=lambda scores: redistribute(scores, mesh, Replicate(), Replicate(), Partial())
            )


def _attend_to_parts(model: nn.Module) -> None:
    """Have attention take plain tensors, the heads of the rank: Qwen3's gets DTensors, which not all kernels take."""

    def run(forward: Callable, *whole: Any, **options: Any) -> torch.Tensor:
        if not isinstance(whole[0], DTensor):
            return forward(*whole, **options)
        output = forward(*(each.to_local() for each in whole), **options)
        return DTensor.from_local(output, whole[0].device_mesh, whole[0].placements, run_check=False)

    for name, module in model.named_modules():
        if name.endswith(".inner_attention"):
            module.forward = partial(run, module.forward)


def pipeline(pipelining_fn: Callable, model: nn.Module, parallel_dims: Any, job_config: Any, *args: Any) -> Any:
    """torchtitan's own `pipelining_fn` of a model, and a mend of torch 2.13: before the first step a stage runs on
    memory nobody has filled, to learn the shapes of what it is handed, and its routers count that as tokens."""

    def run(prepare: Callable, stage: nn.Module, *args: Any, **options: Any) -> Any:
        with kept_counts(stage):
            return prepare(*args, **options)

    made, *rest = pipelining_fn(model, parallel_dims, pipeline_schedule.disable_dualpipev_overlap(job_config), *args)
    for stage in getattr(made, "_stages", None) or [made._stage]:
        for name in ("_prepare_forward_infra", "_prepare_backward_infra"):
            if prepare := getattr(stage, name, None):  # the second is newer than torch 2.11
                setattr(stage, name, partial(run, prepare, stage.submod))
    return (made, *rest)


@contextlib.contextmanager
def kept_counts(model: nn.Module) -> Iterator[None]:
    """Leave the routers' counts of tokens as they are: the balance of the experts is learnt in training alone."""
    before = [(counts, counts.clone()) for name, counts in model.named_buffers() if name.endswith("tokens_per_expert")]
    yield
    for counts, values in before:
        counts.copy_(values)
