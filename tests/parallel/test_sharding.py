"""What the flags of FSDP2 make of a model, as FSDP2 itself sees it: whatever library the model is of."""

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torchtitan.distributed import ParallelDims

from flame.config.parser import parse
from flame.models.causal_lm import CausalLM, ModelArgs
from flame.models.hf import read_config, read_fields
from flame.parallel.apply import parallelize
from tests.tiny import write_config


def groups(folder, model, *flags):
    """{module: FSDP2's group of its parameters} of a model on the first of two ranks."""
    path = str(write_config(folder, model))
    family, config = read_config(read_fields(path), path)
    dist.init_process_group("fake", rank=0, world_size=2, store=dist.HashStore())
    try:
        with torch.device("meta"):
            built = CausalLM(ModelArgs().bind(family, config))
        sharded = parallelize(built, ParallelDims(1, 2, 1, 1, 1, 1, 1, 2), parse([f"--model.config={path}", *flags]))
        modules = {name: module for name, module in sharded.named_modules() if isinstance(module, FSDPModule)}
        found = {name: module._get_fsdp_state()._fsdp_param_group for name, module in modules.items()}
        return {name: group for name, group in found.items() if group}  # the root's are all in another one
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("model", ["llama", "gla"])
@pytest.mark.parametrize(("policy", "freed"), [("default", True), ("always", True), ("never", False)])
def test_blocks_are_freed_after_their_forward_or_kept_as_asked(model, policy, freed, tmp_path):
    found = groups(tmp_path, model, f"--parallelism.fsdp_reshard_after_forward={policy}")
    blocks = {name: group._reshard_after_forward for name, group in found.items() if ".layers." in name}
    assert blocks and set(blocks.values()) == {freed}


@pytest.mark.parametrize("model", ["llama", "gla"])
@pytest.mark.parametrize("offload", [True, False])
def test_parameters_wait_in_the_memory_of_the_cpu_only_if_asked(model, offload, tmp_path):
    flags = ["--training.enable_cpu_offload"] if offload else []
    found = [isinstance(group.offload_policy, CPUOffloadPolicy) for group in groups(tmp_path, model, *flags).values()]
    assert found and set(found) == {offload}


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_blocks_compute_and_reduce_in_the_types_asked_for(dtype, expected, tmp_path):
    for group in groups(tmp_path, "llama", f"--training.mixed_precision_param={dtype}").values():
        assert (group.mp_policy.param_dtype, group.mp_policy.reduce_dtype) == (expected, torch.float32)
