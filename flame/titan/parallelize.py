"""The parallel layouts of torchtitan's own models: which are valid, and the workarounds that make them correct."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torchtitan.distributed import ParallelDims
from torchtitan.models.moe import MoE
from torchtitan.protocols.train_spec import TrainSpec

from flame.config.parser import world_size
from flame.config.schema import JobConfig
from flame.errors import UserError
from flame.parallel import pipeline_schedule
from flame.parallel.apply import force_sum_reduction
from flame.parallel.layout import ASYNC_TP_FLAG, CP_FLAG, PP_FLAG, TP_FLAG, fsdp_degree, reshard_policy, stages
from flame.parallel.sequence_parallel import redistribute, transform_hidden

_EP_FLAG = "--parallelism.expert_parallel_degree"


def validate(spec: TrainSpec, args: Any, job_config: JobConfig) -> None:
    """Raises UserError for the first setting with which a torchtitan model, its flavor's `args`, cannot be trained."""
    model, training, layout = job_config.model, job_config.training, job_config.parallelism
    name, tensor, expert = f"{model.name} {model.flavor}", layout.tensor_parallel_degree, layout.expert_parallel_degree
    attention = getattr(args, "attn_type", "sdpa")
    masked = attention != "sdpa"
    if masked and not has_right_masks(args):
        raise UserError("--model.flavor", model.flavor, hint="torchtitan 0.2.2 mixes up its two kinds of masks")
    if masked != training.varlen:
        reason = f"its attention {'keeps' if masked else 'cannot keep'} documents apart"
        raise UserError("--training.varlen", str(training.varlen).lower(), f"{str(masked).lower()} for {name}", reason)
    if attention not in ("sdpa", "flex") and not torch.accelerator.is_available():
        raise UserError("--model.flavor", model.flavor, hint=f"its {attention} attention needs a GPU, none is visible")
    cp, comm = layout.context_parallel_degree, layout.expert_parallel_comm_backend
    for rejected, setting, found, allowed in (
        (cp > 1, CP_FLAG, cp, "1"),  # ring attention needs CUDA's kernels, on which nothing has tested it
        (layout.enable_async_tensor_parallel, ASYNC_TP_FLAG, "true", "false"),
        (comm != "standard", "--parallelism.expert_parallel_comm_backend", comm, "standard"),
        (tensor > 1 and job_config.compile.enable, TP_FLAG, tensor, "1 with --compile.enable"),
    ):
        if rejected:
            raise UserError(setting, found, allowed, "torchtitan's models are not supported with it in this version")
    experts = args.moe_args.num_experts if has_experts(args) else 1
    sizes = {size: getattr(args, size, None) or 0 for size in ("n_heads", "n_kv_heads", "vocab_size")}
    for setting, degree, size, count in (
        (_EP_FLAG, expert, "experts", experts),
        *((TP_FLAG, tensor, size, count) for size, count in sizes.items()),
    ):
        if count % degree:
            raise UserError(setting, degree, f"a divisor of the {size} of {name}: {count}")
    if expert > 1 and job_config.optimizer.early_step_in_backward:
        raise UserError("--optimizer.early_step_in_backward", "true", f"false with {_EP_FLAG} {expert}")
    if expert > 1 and fsdp_degree(layout, world_size()) > experts:
        _validate_sharded_experts(spec, args, job_config)
    if getattr(args, "enable_weight_tying", False) and world_size() > (found := layout.data_parallel_replicate_degree):
        reason = f"{name} has one table for embedding and head, which torchtitan cannot shard"
        raise UserError("--parallelism.data_parallel_replicate_degree", found, f"all {world_size()} ranks", reason)
    for section in ("training", "validation") if job_config.validation.enable else ("training",):
        seq_len = getattr(job_config, section).seq_len
        if seq_len % (2 * tensor) or seq_len > training.seq_len:
            allowed = f"a multiple of {2 * tensor} (2 x tensor_parallel_degree)"
            allowed += f" and at most training.seq_len {training.seq_len} for torchtitan's models"
            raise UserError(f"--{section}.seq_len", seq_len, allowed)
    if (degree := layout.pipeline_parallel_degree) > 1:
        if expert > 1 and pipeline_schedule.get_schedule(layout).name == "DualPipeV":
            raise UserError(pipeline_schedule.SCHEDULE_FLAG, "DualPipeV", f"another schedule with {_EP_FLAG} {expert}")
        if spec.pipelining_fn is None:
            raise UserError(PP_FLAG, degree, "1", f"torchtitan cannot divide {model.name} into stages")
        pipeline_schedule.validate_csv(job_config, len(stages(args.n_layers, layout)))


def _validate_sharded_experts(spec: TrainSpec, args: Any, job_config: JobConfig) -> None:
    """With more ranks than experts FSDP2 shards their weights' second dimension, and only evenly. Raises UserError."""
    layout, args = job_config.parallelism, copy.deepcopy(args)
    share = fsdp_degree(layout, world_size()) // layout.expert_parallel_degree
    args.moe_args.use_grouped_mm = False  # torchtitan logs a warning where it is not available
    args.update_from_config(job_config)
    with torch.device("meta"):
        weights = [(name, p) for name, p in spec.model_cls(args).named_parameters() if p.ndim == 3]
    for name, weight in weights:
        size = weight.shape[1] // (1 if name.endswith("w2") else layout.tensor_parallel_degree)
        if size % share:
            reason = f"{share} ranks would shard each expert, but do not divide its size of {size}"
            raise UserError(_EP_FLAG, layout.expert_parallel_degree, hint=reason)


def has_experts(args: Any) -> bool:
    """Whether a flavor is a mixture of experts; Qwen3's dense flavors have moe_args as well."""
    return getattr(args, "moe_enabled", hasattr(args, "moe_args"))


def has_right_masks(args: Any) -> bool:
    """Whether a flavor keeps documents apart.

    Llama 4's with layers of two kinds do not: in torchtitan 0.2.2, models/llama4/model/model.py, Attention.forward
    chooses the mask of its kind and then passes on the dict of both.
    """
    return getattr(args, "attn_type", "sdpa") != "sdpa" and not getattr(args, "every_n_layers_nope", None)


def parallelize(
    parallelize_fn: Callable, model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    """torchtitan's `parallelize_fn` of a model, with the workarounds below."""
    if parallel_dims.tp_enabled:
        _sum_router_gradients(model, parallel_dims.get_mesh("tp"))
        _pass_local_heads(model)
    changed = copy.copy(job_config)
    shards, parameters = parallel_dims.dp_shard * parallel_dims.cp, sum(p.numel() for p in model.parameters())
    policy = reshard_policy(job_config, shards, parameters)
    changed.parallelism = replace(job_config.parallelism, fsdp_reshard_after_forward=policy)
    with _hide_tied_ends(model):
        model = parallelize_fn(model, parallel_dims, changed)
    force_sum_reduction(model)
    return model


@contextlib.contextmanager
def _hide_tied_ends(model: Any) -> Iterator[None]:
    """Workaround for torchtitan 0.2.2, models/llama4/infra/parallelize.py, apply_fsdp.

    It gives embedding and head a group of FSDP2 each, which unties them. Effect: the root's group holds their weight.
    """
    tied = getattr(model.model_args, "enable_weight_tying", False)
    owner, ends = type(model), ("tok_embeddings", "output") if tied else ()
    for name in ends:
        setattr(owner, name, None)  # what a class has comes before a module's children
    try:
        yield
    finally:
        for name in ends:
            delattr(owner, name)


def _sum_router_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Workaround for torchtitan 0.2.2, models/llama4/infra/parallelize.py, apply_moe_ep_tp.

    With score_before_experts off, scores multiply the experts' outputs, of which each tensor-parallel rank has a
    partial sum; the gradients of the scores are then partial sums too, and torchtitan never adds them up. Effect: the
    router's gradients are the same as on one rank.
    """
    for module in model.modules():
        if isinstance(module, MoE) and not module.score_before_experts:
            transform_hidden(
                module.router, after=lambda scores: redistribute(scores, mesh, Replicate(), Replicate(), Partial())
            )


def _pass_local_heads(model: nn.Module) -> None:
    """Workaround for torchtitan 0.2.2, models/qwen3/infra/parallelize.py, apply_non_moe_tp.

    Qwen3's attention gets DTensors (use_local_output=False), which not all of torch's kernels take. Effect: the kernels
    get plain tensors, the heads of the rank.
    """

    def run(forward: Callable, *qkv: Any, **options: Any) -> torch.Tensor:
        if not isinstance(qkv[0], DTensor):
            return forward(*qkv, **options)
        output = forward(*(each.to_local() for each in qkv), **options)
        return DTensor.from_local(output, qkv[0].device_mesh, qkv[0].placements, run_check=False)

    for name, module in model.named_modules():
        if name.endswith(".inner_attention"):
            module.forward = partial(run, module.forward)


def pipeline(
    pipelining_fn: Callable, model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig, *args: Any
) -> tuple:
    """torchtitan's `pipelining_fn` of a model, without DualPipeV's overlap and with the workaround below."""
    job_config = pipeline_schedule.disable_dualpipev_overlap(job_config)
    schedule, *rest = pipelining_fn(model, parallel_dims, job_config, *args)
    for stage in getattr(schedule, "_stages", None) or [schedule._stage]:
        _keep_counts_in_shape_inference(stage)
    return (schedule, *rest)


def _keep_counts_in_shape_inference(stage: Any) -> None:
    """Workaround for torch 2.13, distributed/pipelining/stage.py, PipelineStage._prepare_forward_infra.

    Before the first step a stage runs on uninitialised memory to learn the shapes that it receives, and its routers
    count that as tokens. Effect: these runs leave the counts as they were.
    """

    def run(prepare: Callable, *args: Any, **options: Any) -> Any:
        with keep_counts(stage.submod):
            return prepare(*args, **options)

    for name in ("_prepare_forward_infra", "_prepare_backward_infra"):
        if prepare := getattr(stage, name, None):  # the second is newer than torch 2.11
            setattr(stage, name, partial(run, prepare))


@contextlib.contextmanager
def keep_counts(model: nn.Module) -> Iterator[None]:
    """Workaround for torchtitan 0.2.2, models/moe/moe.py, MoE.forward, which counts tokens in validation too.

    Effect: the routers' counts are restored at the end, so that training alone balances the experts.
    """
    before = [(counts, counts.clone()) for name, counts in model.named_buffers() if name.endswith("tokens_per_expert")]
    try:
        yield
    finally:
        for counts, values in before:
            counts.copy_(values)
