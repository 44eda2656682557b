"""The memory of a rank: its parameters are those of the real sharding, its activations those in flight."""

import subprocess
import sys

import pytest
from torch.distributed.tensor import DTensor
from torchtitan.distributed import ParallelDims

from flame.dry_run.activation import fake_process_group, measure
from flame.dry_run.memory import estimate, stage_modules
from flame.dry_run.summary import count_stage
from flame.parallel import layout
from tests.dry_run.jobs import CONTEXT, EXPERT, PIPELINE, TENSOR, build_job, build_model
from tests.launch import REPO, environment

REPLICATE = "--parallelism.data_parallel_replicate_degree"


def count_sharded(config, spec, world_size):
    """Parameters that the first rank really holds, after the parallelisms are applied."""
    layout = config.parallelism
    with fake_process_group(world_size):
        dims = ParallelDims(
            layout.data_parallel_replicate_degree,
            layout.data_parallel_shard_degree,
            layout.context_parallel_degree,
            layout.tensor_parallel_degree,
            *(1, layout.expert_parallel_degree, layout.expert_tensor_parallel_degree, world_size),
        )
        model = spec.parallelize_fn(build_model(config, spec), dims, config)
        local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        return sum(p.numel() for p in local)


@pytest.mark.parametrize(
    "model, world_size, flags",
    [
        ("llama", 2, []),
        ("llama", 6, [f"{TENSOR}=2"]),  # three shards, which divide no parameter evenly
        ("llama", 8, [f"{TENSOR}=2", f"{CONTEXT}=2"]),
        ("llama", 4, [f"{REPLICATE}=2"]),
        ("gla", 6, [f"{TENSOR}=2"]),
        ("gpt_neox", 3, []),
        ("llama3 debugmodel", 6, [f"{TENSOR}=2"]),
        ("qwen3 debugmodel_moe", 4, [f"{EXPERT}=2"]),  # 64 experts
        (
            *("qwen3 debugmodel_moe", 8),
            [f"{TENSOR}=2", f"{EXPERT}=2", "--parallelism.expert_tensor_parallel_degree=2"],
        ),
        ("qwen3 debugmodel_moe", 128, [f"{EXPERT}=4"]),  # more ranks than experts
    ],
)
def test_a_rank_has_as_many_parameters_as_after_really_sharding(tmp_path, model, world_size, flags):
    config, spec = build_job(tmp_path, model, *flags, num_key_value_heads=4)
    (memory,) = estimate(measure(spec, config, "none"), config, world_size)
    assert memory.parameters == count_sharded(config, spec, world_size)
    assert memory.weights == 4 * memory.parameters and memory.optimizer_states == 2 * memory.weights


@pytest.mark.parametrize("schedule, stages", [("1F1B", 2), ("Interleaved1F1B", 4), ("ZBVZeroBubble", 4)])
def test_the_stages_have_all_parameters_and_their_ranks_all_of_these(tmp_path, schedule, stages):
    flags = [f"{PIPELINE}=2", f"--parallelism.pipeline_parallel_schedule={schedule}"]
    config, spec = build_job(tmp_path, "llama", *flags, num_hidden_layers=6)
    model = build_model(config, spec)
    names = stage_modules(6, config.parallelism)
    whole = sum(p.numel() for p in model.parameters())
    assert len(names) == stages
    assert sum(count_stage(model, each) for each in names) == whole
    assert sum(rank.parameters for rank in estimate(measure(spec, config, "none"), config, 2)) == whole


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
def test_the_name_of_a_schedule_may_be_in_lower_case(tmp_path, schedule):
    flag = "--parallelism.pipeline_parallel_schedule"
    config, spec = build_job(tmp_path, "llama", f"{PIPELINE}=2", f"{flag}={schedule}", num_hidden_layers=6)
    parts = measure(spec, config, "none")
    found = estimate(parts, config, 2)
    config.parallelism.pipeline_parallel_schedule = schedule.lower()
    assert estimate(parts, config, 2) == found
    config.parallelism.pipeline_parallel_schedule_csv = "order.csv"  # which may keep all microbatches
    assert (estimate(parts, config, 2)[0].activations > found[0].activations) == (schedule != "ZBVZeroBubble")


def test_a_pipeline_holds_activations_of_more_microbatches_on_its_first_rank(tmp_path):
    config, spec = build_job(tmp_path, "llama", f"{PIPELINE}=2", num_hidden_layers=6)
    first, last = estimate(measure(spec, config, "none"), config, 2)
    assert first.activations > 1.5 * last.activations > 0
    assert (first.logits_and_loss, first.parameters) < (last.logits_and_loss, last.parameters)


def test_a_rank_holds_the_gathered_parameters_of_a_small_model_until_the_backward(tmp_path, monkeypatch):
    config, spec = build_job(tmp_path, "llama", num_hidden_layers=6)
    parts = measure(spec, config, "none")

    def gathered(policy):
        config.parallelism.fsdp_reshard_after_forward = policy
        return estimate(parts, config, 2)[0].communication

    kept, freed, default = (gathered(policy) for policy in ("never", "always", "default"))
    assert kept == 4 * (parts.parameters + parts.head.numel()) and freed < kept  # all of it, in fp32
    assert default == kept
    monkeypatch.setattr(layout, "KEPT_BYTES", 0)
    assert gathered("default") == freed


@pytest.mark.slow
def test_the_estimate_is_within_a_tenth_of_what_a_run_takes():
    done = subprocess.run(
        [sys.executable, str(REPO / "scripts/benchmark/memory.py")],
        env=environment(), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    ratios = [float(line.split()[-3]) for line in done.stdout.splitlines()[1:6]]
    assert len(ratios) == 5 and all(0.9 <= ratio <= 1.1 for ratio in ratios), done.stdout + done.stderr
