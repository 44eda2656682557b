"""Writes the tables of docs/scaling.md, computed for nodes of eight H100 SXM: python scripts/scaling_page.py

Memory is the dry run's. Time is FLOPs and bytes divided by speeds that are assumed; nothing here is measured.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's flame

import torch  # noqa: E402

from flame.runtime import device  # noqa: E402

device.choose()  # before torchtitan is imported

from torchtitan.protocols import train_spec  # noqa: E402
from torchtitan.tools.utils import set_default_dtype  # noqa: E402

from flame.config.parser import parse  # noqa: E402
from flame.dry_run.activation import ModelParts, measure  # noqa: E402
from flame.dry_run.memory import Memory, estimate  # noqa: E402
from flame.errors import UserError  # noqa: E402
from flame.parallel.layout import fsdp_degree, reshard_policy  # noqa: E402
from flame.training.train_spec import register  # noqa: E402
from scripts.tables import fill  # noqa: E402

PAGE = ROOT / "docs" / "scaling.md"
MODELS = {
    "410M": "configs/pythia_410M.json",
    "1B": "scripts/rehearsal/llama3.2_1B.json",
    "7B": "configs/llama2_7B.json",
    "13B": "configs/llama2_13B.json",
    "70B": "configs/llama2_70B.json",
}
GPUS = (8, 64, 512, 4096, 16384)
SEQ_LEN, TOKENS = 4096, 2**24  # a row's, or the model's positions; the most of a step
ROWS = (1, 2, 4, 8, 16, 32)  # of a data-parallel rank
PEAK, MFU = 989e12, 0.5  # FLOP/s in bfloat16; the share of it that computation reaches by itself
NODE, NVLINK, NIC = 8, 450e9, 50e9  # GPUs; bytes/s of a GPU in each direction, within its node and out of it
HOP = 3e-6  # s, from one rank of a ring to the next
MEMORY = 72 * 2**30  # of 80 GiB, without what CUDA, NCCL and fragmentation take


class Layout(NamedTuple):
    """How a job is divided; `shards`: ranks among which each replica of the parameters is sharded, None: all."""

    name: str
    shards: int | None = None
    tensor: int = 1
    pipeline: int = 1


LAYOUTS = (
    Layout("FSDP"),
    Layout("HSDP", shards=NODE),
    Layout("FSDP, TP 8", tensor=8),
    Layout("HSDP of 64, TP 8", shards=64, tensor=8),
    Layout("FSDP, TP 8, PP 4", tensor=8, pipeline=4),
    Layout("FSDP, TP 8, PP 8", tensor=8, pipeline=8),
)


class Step(NamedTuple):
    """A step of a job. Times in ms: computation, tensor parallelism, what FSDP2 sends beside them, and all of it."""

    layout: str
    rows: int
    checkpointing: str
    tokens: int
    memory: int
    compute: float
    tensor: float
    fsdp: float
    bubble: float
    all: float
    mfu: float


def job(model: str, layout: Layout, gpus: int, rows: int, mode: str) -> Any:
    """The job, or None if the ranks cannot be divided so."""
    group = layout.tensor * layout.pipeline
    data = gpus // group
    replicas = data // layout.shards if layout.shards else 1
    fields = json.loads((ROOT / MODELS[model]).read_text())
    if data < 1 or (layout.shards and replicas < 2) or rows < layout.pipeline:
        return None
    degrees = {
        "data_parallel_replicate": replicas,
        "tensor_parallel": layout.tensor,
        "pipeline_parallel": layout.pipeline,
    }
    return parse(
        [f"--model.config={ROOT / MODELS[model]}", f"--training.local_batch_size={rows}"]
        + [f"--training.seq_len={min(SEQ_LEN, fields['max_position_embeddings'])}"]
        + [f"--activation_checkpoint.mode={mode}"]
        + [f"--parallelism.{name}_degree={degree}" for name, degree in degrees.items()]
    )


@cache
def parts(model: str, tensor: int, pipeline: int, rows: int, mode: str) -> tuple[ModelParts, int, Any] | None:
    """The parts of a model on a rank before FSDP2, its FLOPs per token and its config; None if the job is rejected."""
    job_config = job(model, Layout("", None, tensor, pipeline), tensor * pipeline, rows, mode)
    train_spec._extra_train_specs.clear()
    try:
        register(job_config)
    except UserError:  # such as of tied weights in a pipeline
        return None
    spec = train_spec.get_train_spec(job_config.model.name)
    args: Any = spec.model_args[job_config.model.flavor]
    with torch.device("meta"), set_default_dtype(torch.float32):
        _, flops = args.get_nparams_and_flops(spec.model_cls(args), job_config.training.seq_len)
    return measure(spec, job_config, mode), flops, args.hf_config


def step(model: str, layout: Layout, gpus: int, rows: int, mode: str) -> Step | None:
    """A step of a model in a layout; None if it cannot be divided so, or has too many tokens."""
    job_config = job(model, layout, gpus, rows, mode)
    if job_config is None:
        return None
    seq_len, data = job_config.training.seq_len, gpus // (layout.tensor * layout.pipeline)
    if (tokens := rows * seq_len * data) > TOKENS:
        return None
    measured_rows = rows if layout.pipeline == 1 else layout.pipeline  # a pipeline's microbatch is a row
    if (found := parts(model, layout.tensor, layout.pipeline, measured_rows, mode)) is None:
        return None
    pieces, flops, config = found
    ranks = estimate(pieces, job_config, gpus)
    memory = max(rank.peak for rank in ranks)
    recomputed = 4 / 3 if mode == "full" else 1.0
    compute = flops * tokens / gpus * recomputed / (PEAK * MFU)
    blocks = config.num_hidden_layers / layout.pipeline
    tensor = tensor_seconds(layout.tensor, blocks, rows * seq_len, config.hidden_size, mode == "full")
    keeps = reshard_policy(job_config, fsdp_degree(job_config.parallelism, gpus), pieces.parameters) == "never"
    sent = max(_fsdp_seconds(job_config, rank, gpus, blocks, 1 if keeps else 2) for rank in ranks)
    bubble = (layout.pipeline - 1) / rows
    total = max((compute + tensor) * (1 + bubble), sent)
    mfu = flops * tokens / gpus / PEAK / total
    return Step(
        layout.name, rows, mode, tokens, memory, 1e3 * compute, 1e3 * tensor, 1e3 * sent, bubble, 1e3 * total, mfu
    )


def tensor_seconds(degree: int, blocks: float, tokens: int, hidden: int, recomputed: bool) -> float:
    """The time of sequence-parallel TP: a gather and a scatter for attention and for the MLP, forward and backward."""
    collectives = 4 * (3 if recomputed else 2)
    return blocks * collectives * tokens * hidden * 2 * (degree - 1) / degree / NVLINK


def fsdp_seconds(params: float, blocks: float, shards: int, replicas: int, per_node: int, gathers: int) -> float:
    """The time that FSDP2 sends: parameters gathered in bfloat16, gradients scattered, and reduced over replicas, in
    float32. params: of a rank's stage before FSDP2; per_node: ranks of a node that share shards."""
    rate = NVLINK if shards <= per_node else min(NVLINK, per_node * NIC)
    seconds = (shards - 1) / shards * params * (2 * gathers + 4) / rate + (gathers + 1) * blocks * (shards - 1) * HOP
    if replicas > 1:
        seconds += 2 * (replicas - 1) / replicas * 4 * params / shards / NIC
        seconds += blocks * 2 * math.ceil(math.log2(replicas)) * HOP  # a tree
    return seconds


def _fsdp_seconds(job_config: Any, rank: Memory, gpus: int, blocks: float, gathers: int) -> float:
    layout = job_config.parallelism
    shards, replicas = fsdp_degree(layout, gpus), layout.data_parallel_replicate_degree
    per_node = NODE // layout.tensor_parallel_degree
    return fsdp_seconds(rank.parameters * shards, blocks, shards, replicas, per_node, gathers)


def steps(model: str, layout: Layout, gpus: int) -> Iterator[Step]:
    for mode in ("none", "full"):
        for rows in ROWS:
            if found := step(model, layout, gpus, rows, mode):
                if found.memory > MEMORY:
                    break
                yield found


def best(model: str, layout: Layout, gpus: int) -> Step | None:
    """The step of the highest MFU."""
    return max(steps(model, layout, gpus), key=lambda found: found.mfu, default=None)


def _row(name: str, gpus: int, found: Step) -> str:
    ms = " | ".join(f"{value:,.0f}" for value in (found.compute, found.tensor, found.fsdp))
    return (
        f"| {name} | {gpus:,} | {found.layout} | {found.rows} | {found.checkpointing} | {found.tokens / 2**20:,.2f} M "
        f"| {found.memory / 2**30:,.1f} | {ms} | {100 * found.bubble:.0f} | {found.all:,.0f} | {100 * found.mfu:.0f} |"
    )


_COLUMNS = (
    *("model", "GPUs", "layout", "rows", "AC", "tokens", "GiB", "compute, ms", "TP, ms", "FSDP, ms"),
    *("bubble, %", "step, ms", "MFU, %"),
)


def table(models: tuple[str, ...], every: bool) -> str:
    """The fastest layout of each model on each number of GPUs, or with `every` all of them."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    for model in models:
        for gpus in GPUS:
            found = [step for layout in LAYOUTS if (step := best(model, layout, gpus))]
            found.sort(key=lambda step: -step.mfu)
            lines += [_row(model, gpus, step) for step in (found if every else found[:1])]
    return "\n".join(lines) + "\n"


TABLES = {"fastest": (tuple(MODELS), False), "layouts": (("7B", "70B"), True)}


def page(text: str) -> str:
    """The page with its tables up to date."""
    return fill(text, {name: table(models, every) for name, (models, every) in TABLES.items()})


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
