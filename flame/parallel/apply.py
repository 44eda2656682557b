"""Activation checkpointing, compile, then FSDP2 in all its forms: torchtitan's functions in torchtitan's order."""

import warnings
from functools import partial
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
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list, apply_fsdp
from torchtitan.tools.utils import device_type

from flame.config.schema import Compile, JobConfig
from flame.parallel import layout
from flame.parallel.context import apply_context_parallel, shard_sequence
from flame.parallel.tensor import apply_tensor_parallel, shard_activations


def parallelize(model: Any, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """torchtitan's `parallelize_fn` for a flame.models.causal_lm.CausalLM on the meta device."""
    if parallel_dims.cp_enabled:
        apply_context_parallel(model, parallel_dims.get_mesh("cp"), model.family.tp_plan)
    if parallel_dims.tp_enabled:
        apply_tensor_parallel(model, parallel_dims.get_mesh("tp"), model.family.tp_plan)
        if model.head is not None:
            model.head.gather = job_config.parallelism.disable_loss_parallel
        if job_config.parallelism.enable_async_tensor_parallel:
            enable_async_tp(parallel_dims.get_mesh("tp"), job_config)
    compiled, ac = layout.compiles(model.family, job_config), job_config.activation_checkpoint
    if ac.mode != "none":
        folder = job_config.job.dump_folder
        apply_ac(model, ac, model_compile_enabled=compiled, op_sac_save_list=_op_sac_save_list, base_folder=folder)
    if compiled:
        _compile(model, job_config.compile)
    if parallel_dims.tp_enabled:
        shard_activations(model, parallel_dims.get_mesh("tp"))
    if parallel_dims.cp_enabled:
        shard_sequence(model, parallel_dims.get_mesh("cp"))

    if parallel_dims.fsdp_enabled:
        names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        apply_fsdp(
            model,
            parallel_dims.get_mesh(names),
            param_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce],
            pp_enabled=parallel_dims.pp_enabled,
            cpu_offload=job_config.training.enable_cpu_offload,
            reshard_after_forward_policy=layout.reshard_policy(
                job_config, parallel_dims.dp_shard * parallel_dims.cp, sum(p.numel() for p in model.parameters())
            ),
        )
        force_sum_reduction(model)
    return model


class FSDPDims(ParallelDims):
    """The meshes of a job whose parameters FSDP2 holds, on a mesh of one rank where nothing is sharded.

    A workaround for torchtitan 0.2.2 (distributed/parallel_dims.py), which uses FSDP2 from two shards on. With fewer it
    casts by autocast or, under tensor and pipeline parallelism, not at all: other numbers, and slower ones on a GPU.
    """

    fsdp_enabled = property(lambda self: True)

    def _mesh_exist(self, name: str, degree: int) -> bool:
        return name == "fsdp" or super()._mesh_exist(name, degree)


def enable_async_tp(mesh: DeviceMesh, job_config: JobConfig) -> None:
    """Have torch.compile overlap tensor parallelism's collectives with its matrix products.

    A workaround for torchtitan 0.2.2, whose `maybe_enable_async_tp` (distributed/tensor_parallel.py) does not call
    `enable_symm_mem_for_group`: torch 2.13 deprecates it, yet its pass (micro_pipeline_tp.py) skips other groups.
    """
    maybe_enable_async_tp(job_config, mesh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(mesh.get_group().group_name)


def _compile(model: Any, config: Compile) -> None:
    """Compile each block, so that a run that compiles anew, as a resumed one does, computes the same, bit for bit.

    And the norm behind them, where it is as many operators as those in the blocks.

    torchtitan 0.2.2's `apply_compile` (models/llama3/infra/parallelize.py) forces fullgraph, and takes no options.
    """
    # No kernel is chosen by its speed if the choice changes a sum.
    options = {"deterministic": True} if config.backend == "inductor" else None
    # Graphs are tried in the order in which they were compiled: rows of another length, as a validation may have, make
    # one of any length, which would then serve the training as well. torchtitan's `apply_ac` does the same.
    torch._C._dynamo.eval_frame._set_lru_cache(False)  # type: ignore[attr-defined]
    family = model.family
    compiled = partial(torch.compile, backend=config.backend, fullgraph=family.fullgraph, options=options)
    for name, block in model.layers.items():
        model.layers.register_module(name, compiled(block))
    if family.fullgraph and model.norm is not None:
        setattr(model.backbone, family.norm, compiled(model.norm))


def force_sum_reduction(model: nn.Module) -> None:
    """Have FSDP2 sum gradients on a CPU.

    A workaround for torchtitan 0.2.2, whose `disable_fsdp_gradient_division` (models/llama3/infra/parallelize.py) sets
    a divide factor of 1: FSDP2 then chooses PREMUL_SUM, which gloo does not have, over SUM, which is the same here.
    """
    for module in model.modules() if device_type == "cpu" else ():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
