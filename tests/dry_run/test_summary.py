"""The page of a dry run: its numbers are those of the run, and it makes no ranks, no weights and no files."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtitan.protocols.train_spec import get_train_spec

from flame.config.parser import parse
from flame.dry_run.summary import summarize
from flame.errors import UserError
from flame.preflight.validate import check
from tests.dry_run.jobs import EXPERT, PIPELINE, TENSOR, build_job, build_model
from tests.launch import REPO, SMALL, environment
from tests.tiny import write_config


def test_a_table_that_is_embedding_and_head_counts_once_and_is_multiplied_with(tmp_path):
    config, spec = build_job(tmp_path, "qwen3 0.6B", "--model.grow_vocab")
    args = spec.model_args["0.6B"]
    model = build_model(config, spec)
    parameters, flops = args.get_nparams_and_flops(model, 128)
    assert parameters == sum(p.numel() for p in model.parameters()) == 596_049_920
    attention = args.n_layers * args.n_heads * 2 * args.head_dim * 128
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert flops == 6 * (parameters + attention) and norms < 1e5  # which torchtitan counts as multiplied too


def test_the_page_has_the_numbers_of_the_job(tmp_path):
    source = tmp_path / "notes.jsonl"
    source.write_text("".join(json.dumps({"text": "x" * 99}) + "\n" for _ in range(100)))  # 100 ids per document
    config = parse(
        [
            *(f"--model.config={write_config(tmp_path, 'llama')}", *SMALL, f"--training.dataset={source}"),
            *("--training.steps=100", "--training.global_batch_size=64", "--lr_scheduler.warmup_steps=10"),
            *("--lr_scheduler.decay_ratio=0.2", "--optimizer.lr=1e-3", f"--job.dump_folder={tmp_path}/run"),
        ]
    )
    page = " ".join(summarize(config, 4).split())
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
    "model, flag, found",
    [
        ("llama3 debugmodel", f"{PIPELINE}=2", "0 0 0 to 2 tok_embeddings"),
        ("llama3 debugmodel_flex_attn", "--training.varlen", "torchtitan's llama3 debugmodel_flex_attn"),
        ("deepseek_v3 debugmodel", f"{EXPERT}=2", "pipeline 1, expert (within data) 2"),
        ("llama4 debugmodel", f"{TENSOR}=2", "and so the peak, are a rough estimate"),
    ],
)
def test_the_page_of_a_model_of_torchtitan(tmp_path, monkeypatch, model, flag, found):
    monkeypatch.setenv("NGPU", "4")
    name, flavor = model.split()
    config = parse([*SMALL, f"--model.name={name}", f"--model.flavor={flavor}", flag])
    check(config, 4)
    page = " ".join(summarize(config, 4).split())
    args = get_train_spec(name).model_args[flavor]
    with torch.device("meta"):
        parameters, flops = args.get_nparams_and_flops(get_train_spec(name).model_cls(args), config.training.seq_len)
    assert found in page and f"parameters {parameters:,} FLOPs per token {flops:,} ranks" in page


class RealBytes(TorchDispatchMode):
    """Adds up the bytes of all tensors that are made with values: neither fake nor on the meta device."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:  # comes back as operations on the local tensors
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if torch.is_tensor(x) and not isinstance(x, FakeTensor)]
        self.total += sum(x.untyped_storage().nbytes() for x in tensors if x.device.type != "meta")
        return result


def test_llama_70b_on_1024_ranks_needs_no_weights_and_no_process_group_of_that_size(tmp_path, monkeypatch):
    groups, init = [], dist.init_process_group
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kw: groups.append((args, kw)) or init(*args, **kw))
    monkeypatch.chdir(tmp_path)
    model = f"--model.config={REPO / 'configs/llama2_70B.json'}"
    config = parse([model, f"{TENSOR}=8", f"{PIPELINE}=4", "--training.seq_len=4096", "--job.mfu=0.45"])
    with RealBytes() as real:
        page = summarize(config, 1024)
    assert "68,976,648,192" in page and "1,024: data 32" in page
    flops, tokens = (int(re.search(rf"{row} +([\d,]+)", page)[1].replace(",", "")) for row in ("per token", "tokens "))
    if not torch.cuda.is_available():  # the example's peak
        assert re.search(rf"45% +{flops * tokens / (1024 * 989e12 * 0.45) / 3600:.2f} ", page)
    assert real.total < 1e6
    assert groups and all(args == ("fake",) and kw["world_size"] == 8 for args, kw in groups)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "setting, rule", [(TENSOR, "a divisor of the model's num_attention_heads, 4"), (PIPELINE, "1")]
)
def test_a_layout_that_a_run_would_reject_is_rejected(tmp_path, setting, rule):
    config = parse([f"--model.config={write_config(tmp_path, 'llama')}", *SMALL, f"{setting}=3"])
    with pytest.raises(UserError) as error:
        summarize(config, 3)
    assert (error.value.setting, error.value.allowed) == (setting, rule)


@pytest.mark.parametrize("degree, code", [(1, 0), (3, 2)])
def test_train_sh_ends_with_0_and_a_page_or_with_2_and_one_line_and_leaves_nothing(tmp_path, degree, code):
    env = environment(NNODE="4", NGPU="1", FLAME_PYTHON=sys.executable)
    flags = [f"--model.config={write_config(tmp_path, 'llama')}", f"{TENSOR}={degree}"]
    command = ["bash", str(REPO / "train.sh"), "--dry_run", *flags]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.count("ranks            4: data 4"), done.stderr.count("\n")) == (
        (code, 1, 0) if code == 0 else (code, 0, 1)
    )
    assert code == 0 or done.stderr.startswith(f"flame: {TENSOR}")
    assert os.listdir(tmp_path) == ["llama.json"]


# A machine with a GPU, as far as torch is asked before it is used; every launch of a Triton kernel fails.
ON_A_GPU = """
import sys, torch, triton
torch._utils._get_available_device_type = lambda: "cuda"
torch.accelerator.is_available = torch.cuda.is_available = lambda: True
torch._C._get_accelerator = lambda: torch.device("cuda")
torch.cuda.get_device_name = lambda: "NVIDIA H100"
def run(*args, **options): raise AssertionError("a kernel is launched")
triton.JITFunction.run = run
from flame.dry_run.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("model", ["llama", "gla"])
def test_a_machine_with_a_gpu_computes_nothing_on_it_and_lends_its_name(tmp_path, model):
    flags = [f"--model.config={write_config(tmp_path, model)}", *SMALL, "--training.enable_cpu_offload"]
    command = [sys.executable, "-c", ON_A_GPU, *flags]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "traced on a CPU" in done.stdout and "time on 1 NVIDIA H100 (989 TFLOPS each)" in done.stdout


def test_a_rank_makes_no_page():
    command = [sys.executable, "-m", "flame.train", "--dry_run"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "python -m flame.dry_run" in done.stderr


@pytest.mark.parametrize("flag", ["--dry_run", "--job.dry_run", "--memory_estimation.enabled"])
def test_the_flags_that_ask_for_it(flag):
    assert parse([flag]).job.dry_run and not parse([]).job.dry_run
