"""What the flags of FSDP2 do to a step of a model, on the first of two ranks; the other one does not exist."""

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec

from flame.config.parser import parse
from flame.models.causal_lm import CausalLM, ModelArgs
from flame.models.hf import read_config, read_fields
from flame.parallel import layout
from flame.parallel.apply import FSDPDims, parallelize
from flame.titan.parallelize import parallelize as titan_parallelize
from tests.tiny import write_config


@pytest.fixture(autouse=True)
def process_group():
    dist.init_process_group("fake", rank=0, world_size=2, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def sharded(folder, name, *flags):
    path = str(write_config(folder, name))
    with torch.device("meta"):
        model = CausalLM(ModelArgs().bind(*read_config(read_fields(path), path)))
    return parallelize(model, ParallelDims(1, 2, 1, 1, 1, 1, 1, 2), parse([f"--model.config={path}", *flags]))


def loss_of(model):
    model.to_empty(device="cpu").init_weights()
    tokens = torch.randint(0, 320, (2, 16))
    return model(tokens, labels=tokens)


@pytest.mark.parametrize("name", ["llama", "gla"])
@pytest.mark.parametrize(
    ("policy", "small", "freed"),
    [("default", 2**30, False), ("default", 0, True), ("always", 2**30, True), ("never", 0, False)],
)
def test_blocks_are_freed_after_their_forward_or_kept_as_asked(name, policy, small, freed, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "KEPT_BYTES", small)
    model = sharded(tmp_path, name, f"--parallelism.fsdp_reshard_after_forward={policy}")
    assert all(isinstance(p, DTensor) for p in model.layers.parameters())
    loss_of(model)
    assert {isinstance(p, DTensor) for p in model.layers.parameters()} == {freed}  # a whole one is a plain tensor


@pytest.mark.parametrize("dtype, most", [("bfloat16", 2**29), ("float32", 2**28)])
def test_by_default_a_model_of_more_than_a_gibibyte_is_freed_where_ranks_share_it(dtype, most):
    config = parse([f"--training.mixed_precision_param={dtype}"])
    assert layout.reshard_policy(config, 2, most) == "never"
    assert layout.reshard_policy(config, 2, most + 1) == "default"  # torchtitan's
    assert layout.reshard_policy(config, 1, most + 1) == "never"
    config.parallelism.pipeline_parallel_degree = 2
    assert layout.reshard_policy(config, 2, most + 1) == "never"


@pytest.mark.parametrize("shards, small, freed", [(1, 0, False), (2, 0, True), (2, 2**30, False)])
def test_a_model_of_torchtitan_is_freed_or_kept_by_the_same_rule(shards, small, freed, monkeypatch):
    monkeypatch.setattr(layout, "KEPT_BYTES", small)
    spec, config = get_train_spec("llama3"), parse(["--model.name=llama3", "--model.flavor=debugmodel"])
    with torch.device("meta"):
        model = spec.model_cls(spec.model_args["debugmodel"])
    model = titan_parallelize(spec.parallelize_fn, model, FSDPDims(2 // shards, shards, 1, 1, 1, 1, 1, 2), config)
    with torch.no_grad():
        model.to_empty(device="cpu").init_weights()
    model(torch.randint(0, 320, (2, 16)))
    assert {isinstance(p, DTensor) for p in model.layers.parameters()} == {freed}


@pytest.mark.parametrize("name", ["llama", "gla"])
@pytest.mark.parametrize("offload", [True, False])
def test_parameters_are_offloaded_only_if_asked(name, offload, tmp_path):
    model = sharded(tmp_path, name, *(["--training.enable_cpu_offload"] if offload else []))
    # FSDP2's own state, as nothing can be offloaded without a GPU
    groups = [
        module._get_fsdp_state()._fsdp_param_group for module in model.modules() if isinstance(module, FSDPModule)
    ]
    assert {isinstance(group.offload_policy, CPUOffloadPolicy) for group in groups if group} == {offload}


class ReducedTypes(TorchDispatchMode):
    """The dtypes of what is reduce-scattered."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "reduce_scatter" in func.name():
            self.found.add(args[1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_blocks_compute_and_reduce_in_the_types_asked_for(dtype, expected, tmp_path):
    model, computed = sharded(tmp_path, "llama", f"--training.mixed_precision_param={dtype}"), set()
    for block in model.layers.values():
        block.mlp.register_forward_hook(
            lambda mlp, _, output: computed.update({mlp.up_proj.weight.dtype, output.dtype})
        )
    with ReducedTypes() as reduced:
        loss_of(model).backward()
    assert computed == {expected} and reduced.found == {torch.float32}
