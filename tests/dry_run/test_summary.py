"""The dry run: its numbers are those of the run, it needs no rank and little time, and it leaves nothing."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg
from torch.distributed.tensor import DTensor
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import _extra_train_specs, get_train_spec

from flame.config.parser import parse
from flame.dry_run.activation import measure
from flame.dry_run.memory import estimate, measure_modes, stage_modules
from flame.dry_run.summary import count_stage, describe
from flame.preflight.validate import check
from flame.training.train_spec import register
from tests.launch import REPO, SMALL, environment
from tests.tiny import write_config

_DEGREE = "--parallelism.{}_parallel_degree={}"


@pytest.fixture(autouse=True)
def no_spec_is_left():
    yield
    _extra_train_specs.clear()


def job(folder, model, *flags, **changes):
    """The config and TrainSpec of a tiny model, or of a flavor of torchtitan's, as "qwen3 debugmodel"."""
    name, _, flavor = model.partition(" ")
    own = [f"--model.name={name}", f"--model.flavor={flavor}"]
    config = parse([*(own if flavor else [f"--model.config={write_config(folder, model, **changes)}"]), *SMALL, *flags])
    _extra_train_specs.clear()
    register(config)
    return config, get_train_spec(config.model.name)


def build(config, spec):
    with torch.device("meta"):
        return spec.model_cls(spec.model_args[config.model.flavor])


def sharded_parameters(config, spec, ranks):
    """Parameters that the first rank of `ranks` really has, after flame's own parallelisms."""
    layout = config.parallelism
    dist.init_process_group("fake", rank=0, world_size=ranks, store=dist.HashStore())
    try:
        dims = ParallelDims(
            layout.data_parallel_replicate_degree,
            layout.data_parallel_shard_degree,
            layout.context_parallel_degree,
            layout.tensor_parallel_degree,
            *(1, layout.expert_parallel_degree, layout.expert_tensor_parallel_degree, ranks),
        )
        model = spec.parallelize_fn(build(config, spec), dims, config)
        local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        return sum(p.numel() for p in local)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "model, ranks, degrees",
    [
        ("llama", 2, {}),
        ("llama", 6, {"tensor": 2}),  # three shards, which divide no parameter evenly
        ("llama", 8, {"tensor": 2, "context": 2}),
        ("llama", 4, {"data_parallel_replicate": 2}),
        ("gla", 6, {"tensor": 2}),
        ("gpt_neox", 3, {}),
        ("llama3 debugmodel", 6, {"tensor": 2}),
        ("qwen3 debugmodel_moe", 4, {"expert": 2}),  # 64 experts
        ("qwen3 debugmodel_moe", 8, {"tensor": 2, "expert": 2, "expert_tensor": 2}),
        ("qwen3 debugmodel_moe", 128, {"expert": 4}),  # more ranks than experts
    ],
)
def test_a_rank_has_as_many_parameters_as_after_really_sharding(tmp_path, model, ranks, degrees):
    flags = [
        f"--parallelism.{kind}_degree={d}" if kind.startswith("data") else _DEGREE.format(kind, d)
        for kind, d in degrees.items()
    ]
    config, spec = job(tmp_path, model, *flags, num_key_value_heads=4)
    (memory,) = estimate(measure(spec, config, ranks, "none"), config, ranks)
    assert memory.parameters == sharded_parameters(config, spec, ranks)
    assert memory.weights == 4 * memory.parameters and memory.optimizer == 2 * memory.weights


@pytest.mark.parametrize("schedule, stages", [("1F1B", 2), ("Interleaved1F1B", 4), ("ZBVZeroBubble", 4)])
def test_the_stages_have_all_parameters_and_their_ranks_all_of_these(tmp_path, schedule, stages):
    flags = [_DEGREE.format("pipeline", 2), f"--parallelism.pipeline_parallel_schedule={schedule}"]
    config, spec = job(tmp_path, "llama", *flags, num_hidden_layers=6)
    model = build(config, spec)
    names = stage_modules(6, config.parallelism)
    whole = sum(p.numel() for p in model.parameters())
    assert len(names) == stages
    assert sum(count_stage(model, each) for each in names) == whole
    assert sum(rank.parameters for rank in estimate(measure(spec, config, 2, "none"), config, 2)) == whole


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
def test_a_schedule_goes_by_its_name_in_small_letters_too(tmp_path, schedule):
    flag = "--parallelism.pipeline_parallel_schedule"
    config, spec = job(tmp_path, "llama", _DEGREE.format("pipeline", 2), f"{flag}={schedule}", num_hidden_layers=6)
    parts = measure(spec, config, 2, "none")
    found = estimate(parts, config, 2)
    config.parallelism.pipeline_parallel_schedule = schedule.lower()
    assert estimate(parts, config, 2) == found
    config.parallelism.pipeline_parallel_schedule_csv = "order.csv"  # which may keep all microbatches
    assert (estimate(parts, config, 2)[0].activations > found[0].activations) == (schedule != "ZBVZeroBubble")


def test_full_checkpointing_keeps_a_block_input_and_every_second_block_half_of_them(tmp_path):
    config, spec = job(
        tmp_path, "llama", "--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=2"
    )
    modes = measure_modes(spec, config, 1)
    assert list(modes) == ["none", "selective", "full"]
    none, half, full = ([block.saved for block in parts.blocks] for parts in modes.values())
    hidden = 8 * 128 * 64 * 4  # batch, seq, hidden, float32
    assert full[0] == pytest.approx(hidden, rel=0.1)
    assert half == [none[0], full[1]] and none[0] > 5 * full[0]


def test_a_pipeline_holds_activations_of_more_microbatches_on_its_first_rank(tmp_path):
    config, spec = job(tmp_path, "llama", _DEGREE.format("pipeline", 2), num_hidden_layers=6)
    first, last = estimate(measure(spec, config, 2, "none"), config, 2)
    assert first.activations > 1.5 * last.activations > 0
    assert (first.head, first.parameters) < (last.head, last.parameters)


@pytest.mark.parametrize("model", ["llama", "llama3 debugmodel"])
def test_tensor_parallel_ranks_share_activations_and_logits(tmp_path, model):
    parts = {}
    for degree in (1, 2):
        config, spec = job(tmp_path, model, _DEGREE.format("tensor", degree))
        parts[degree] = measure(spec, config, degree, "none")
    one, two = parts[1], parts[2]
    assert 0.45 < two.blocks[0].saved / one.blocks[0].saved < 0.7
    assert 0.3 < two.head.saved / one.head.saved < 0.6
    assert 0.4 < two.blocks[0].backward / one.blocks[0].backward < 0.7
    assert measure(spec, config, 2, "none") == two  # whatever this process ran before


def test_only_blocks_are_guessed_where_tokens_choose_their_experts(tmp_path):
    dense, whole, divided = (
        measure(*reversed(job(tmp_path, f"{model} debugmodel", _DEGREE.format("expert", degree))), 2, "none")
        for model, degree in (("llama3", 1), ("deepseek_v3", 1), ("deepseek_v3", 2))
    )
    assert whole.guessed and divided.guessed and not dense.guessed
    # torchtitan's logits are whole: of the same vocabulary and width it is the same memory.
    assert whole.head.forward == pytest.approx(dense.head.forward, rel=0.1)
    assert whole.head == divided.head
    experts = sum(math.prod(shape) for shape in whole.blocks[-1].shapes if len(shape) == 3)
    assert whole.blocks[-1].gradients - divided.blocks[-1].gradients == 4 * experts // 2


def test_a_table_that_is_embedding_and_head_counts_once_and_is_multiplied_with(tmp_path):
    config, spec = job(tmp_path, "qwen3 0.6B", "--model.grow_vocab")
    args = spec.model_args["0.6B"]
    model = build(config, spec)
    parameters, flops = args.get_nparams_and_flops(model, 128)
    assert parameters == sum(p.numel() for p in model.parameters()) == 596_049_920
    attention = args.n_layers * args.n_heads * 2 * args.head_dim * 128
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert flops == 6 * (parameters + attention) and norms < 1e5  # which torchtitan counts as multiplied too


def test_the_page_has_the_numbers_of_the_job(tmp_path):
    source = tmp_path / "notes.jsonl"
    source.write_text("".join(json.dumps({"text": "x" * 99}) + "\n" for _ in range(100)))  # 100 ids a document
    config = parse(
        [
            *(f"--model.config={write_config(tmp_path, 'llama')}", *SMALL, f"--training.dataset={source}"),
            *("--training.steps=100", "--training.global_batch_size=64", "--lr_scheduler.warmup_steps=10"),
            *("--lr_scheduler.decay_ratio=0.2", "--optimizer.lr=1e-3", f"--job.dump_folder={tmp_path}/run"),
        ]
    )
    page = " ".join(describe(config, 4).split())
    for found in (
        "tokens per step 8,192",  # 64 x 128
        "819,200 in 100 steps",
        "notes 1.000 819,200 100 about 10,000 about 81.92",
        "1 0.0001 first 10 0.001 end of warm-up 50 0.001 middle",
        "AC none (this job) AC full",
    ):
        assert found in page
    start, last = (re.search(rf"(\d+) ([\d.e-]+) {what}", page) for what in ("start of decay", "last"))
    assert int(start[1]) == 82 and float(start[2]) < 1e-3 and float(last[2]) < 1e-4
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "model, flags, found",
    [
        (
            "llama3 debugmodel",
            ["--parallelism.pipeline_parallel_degree=2"],
            "peak of the rank 0 0 0 to 2 tok_embeddings",
        ),
        ("llama3 debugmodel_flex_attn", ["--training.varlen"], "torchtitan's llama3 debugmodel_flex_attn"),
        ("deepseek_v3 debugmodel", ["--parallelism.expert_parallel_degree=2"], "pipeline 1, expert (within data) 2"),
        ("llama4 debugmodel", ["--parallelism.tensor_parallel_degree=2"], "so the peak too, are a rough guess"),
    ],
)
def test_the_page_of_a_model_of_torchtitan(tmp_path, monkeypatch, model, flags, found):
    monkeypatch.setenv("NGPU", "4")
    name, flavor = model.split()
    config = parse([*SMALL, f"--model.name={name}", f"--model.flavor={flavor}", *flags])
    check(config, 4)
    page = " ".join(describe(config, 4).split())
    args = get_train_spec(name).model_args[flavor]
    with torch.device("meta"):
        parameters, flops = args.get_nparams_and_flops(get_train_spec(name).model_cls(args), config.training.seq_len)
    assert found in page and f"parameters {parameters:,} FLOPs per token {flops:,} ranks" in page


def test_torchtitans_llama_takes_what_transformers_takes(tmp_path):
    """Of the same sizes, blocks of either keep as much for the backward, but for fused or copied pieces."""
    config, spec = job(tmp_path, "llama3 debugmodel")
    args = spec.model_args["debugmodel"]
    theirs = measure(spec, config, 1, "none")
    config, spec = job(
        *(tmp_path, "llama"), hidden_size=args.dim, intermediate_size=768, num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_heads, num_hidden_layers=args.n_layers, vocab_size=args.vocab_size,
    )  # fmt: skip
    ours = measure(spec, config, 1, "none")
    assert [sorted(part.shapes) for part in theirs.blocks] == [sorted(part.shapes) for part in ours.blocks]
    assert theirs.blocks[0].saved == pytest.approx(ours.blocks[0].saved, rel=0.2)


WEIGH = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print("weighed", used.ru_utime + used.ru_stime, used.ru_maxrss, file=sys.stderr)
sys.exit(code)
"""  # in a process of its own, whose only child is the one to be weighed


def dry_run(folder, *flags, ranks=1):
    """The process that `train.sh --dry_run` is, and the CPU seconds and bytes it took."""
    env = environment(NNODE=str(ranks), NGPU="1", FLAME_PYTHON=sys.executable)
    command = [sys.executable, "-c", WEIGH, "bash", str(REPO / "train.sh"), "--dry_run", *flags]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    done.stderr, _, weighed = done.stderr.rpartition("weighed ")
    seconds, kibibytes = map(float, weighed.split())
    return done, seconds, kibibytes * 1024


def test_llama_70b_on_1024_ranks_takes_little_time_and_memory_and_leaves_nothing(tmp_path):
    flags = (_DEGREE.format("tensor", 8), _DEGREE.format("pipeline", 4), "--training.seq_len=4096", "--job.mfu=0.45")
    done, seconds, memory = dry_run(tmp_path, f"--model.config={REPO / 'configs/llama2_70B.json'}", *flags, ranks=1024)
    assert (done.returncode, done.stderr) == (0, "")
    assert "68,976,648,192" in done.stdout and "1,024: data 32" in done.stdout
    flops, tokens = (
        int(re.search(rf"{row} +([\d,]+)", done.stdout)[1].replace(",", "")) for row in ("FLOPs per token", "tokens ")
    )
    if not torch.cuda.is_available():  # the example's peak
        assert re.search(rf"45% +{flops * tokens / (1024 * 989e12 * 0.45) / 3600:.2f} ", done.stdout)
    assert seconds < 15 and memory < 2 * 2**30
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "flag, said",
    [
        (_DEGREE.format("tensor", 3), "must divide the model's num_attention_heads, 4"),
        (_DEGREE.format("pipeline", 3), "must be 1: "),
    ],
)
def test_what_a_run_refuses_is_refused(tmp_path, flag, said):
    config = parse([f"--model.config={write_config(tmp_path, 'llama')}", *SMALL, flag])
    with pytest.raises(ValueError, match=re.escape(said)):
        describe(config, 3)


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path):
    model = write_config(tmp_path, "llama")
    done, _, _ = dry_run(tmp_path, f"--model.config={model}", _DEGREE.format("tensor", 3), ranks=5)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("flame: --parallelism.tensor_parallel_degree 3 ") and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["llama.json"]


@pytest.mark.parametrize("flag", ["--dry_run", "--job.dry_run", "--memory_estimation.enabled"])
def test_the_flags_that_ask_for_it(flag):
    assert parse([flag]).job.dry_run and not parse([]).job.dry_run


@pytest.mark.slow
def test_the_estimate_is_within_a_tenth_of_what_a_run_takes():
    done = subprocess.run(
        [sys.executable, str(REPO / "scripts/benchmark/memory.py")],
        env=environment(), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    ratios = [float(line.split()[-3]) for line in done.stdout.splitlines()[1:]]
    assert len(ratios) == 5 and all(0.9 <= ratio <= 1.1 for ratio in ratios), done.stdout + done.stderr
