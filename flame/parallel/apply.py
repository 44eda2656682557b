"""Activation checkpointing, compile, then FSDP2, HSDP or DDP: torchtitan's functions in torchtitan's order."""

import warnings
from typing import Any

import torch
import torch.nn as nn
from torch.distributed._symmetric_memory import enable_symm_mem_for_group
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.tensor_parallel import maybe_enable_async_tp
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list, apply_compile, apply_ddp, apply_fsdp
from torchtitan.tools.utils import device_type

from flame.parallel.context import divide_heads, divide_sequences
from flame.parallel.tensor import apply_tensor_parallel, divide_activations


def parallelize(model: Any, parallel_dims: ParallelDims, job_config: Any) -> nn.Module:
    """torchtitan's `parallelize_fn` for a flame.models.causal_lm.CausalLM on the meta device."""
    if parallel_dims.cp_enabled:
        divide_heads(model, parallel_dims.get_mesh("cp"), model.family.cut)
    if parallel_dims.tp_enabled:
        apply_tensor_parallel(model, parallel_dims.get_mesh("tp"), model.family.cut)
        if model.head is not None:
            model.head.gather = job_config.parallelism.disable_loss_parallel
        if job_config.parallelism.enable_async_tensor_parallel:
            enable_async_tp(parallel_dims.get_mesh("tp"), job_config)
    compiled = job_config.compile.enable
    if job_config.activation_checkpoint.mode != "none":
        apply_ac(
            model,
            job_config.activation_checkpoint,
            model_compile_enabled=compiled,
            op_sac_save_list=_op_sac_save_list,
            base_folder=job_config.job.dump_folder,
        )
    if compiled and not model.family.fullgraph:
        _compile_with_graph_breaks(model, job_config.compile.backend)
    elif compiled:
        apply_compile(model, job_config.compile)
    if parallel_dims.tp_enabled:
        divide_activations(model, parallel_dims.get_mesh("tp"))
    if parallel_dims.cp_enabled:
        divide_sequences(model, parallel_dims.get_mesh("cp"))

    if parallel_dims.fsdp_enabled:
        names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        apply_fsdp(
            model,
            parallel_dims.get_mesh(names),
            param_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce],
            pp_enabled=parallel_dims.pp_enabled,
            cpu_offload=job_config.training.enable_cpu_offload,
            reshard_after_forward_policy=job_config.parallelism.fsdp_reshard_after_forward,
        )
        force_sum_reduction(model)
    elif parallel_dims.dp_replicate_enabled:
        apply_ddp(model, parallel_dims.get_mesh("dp_replicate"), enable_compile=compiled)
    return model


def enable_async_tp(mesh: DeviceMesh, job_config: Any) -> None:
    """Have torch.compile hide the collectives of regions behind their matrix products."""
    maybe_enable_async_tp(job_config, mesh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # torch calls it deprecated, and yet its pass leaves alone all groups but those it was called for; torchtitan
        # 0.2.2 does not call it.
        enable_symm_mem_for_group(mesh.get_group().group_name)


def _compile_with_graph_breaks(model: Any, backend: str) -> None:
    # torchtitan asks for fullgraph=True, which the family's row denies.
    for name, block in model.layers.items():
        model.layers.register_module(name, torch.compile(block, backend=backend))


def force_sum_reduction(model: nn.Module) -> None:
    """Have FSDP2 add gradients on a CPU: gloo has no PREMUL_SUM, its choice for torchtitan's gradient factor of 1."""
    for module in model.modules() if device_type == "cpu" else ():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
