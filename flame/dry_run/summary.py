"""The page of a dry run: what a job would train, need and cost, without process group, weights or run folder."""

import copy
import logging
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import set_default_dtype

from flame.config.schema import JobConfig
from flame.data.document import Bad
from flame.data.source import Source, build_sources
from flame.dry_run.memory import ADAM_STATES, Memory, estimate, measure_modes, stage_modules
from flame.models.listing import align
from flame.parallel.layout import dp_degree
from flame.parallel.pipeline_schedule import stage_rank
from flame.training.lr_schedule import build_lr_schedule
from flame.training.metrics import known_peak_flops
from flame.training.train_spec import register

Row = tuple[str, ...]
_SAMPLES, _MAX_CHARACTERS = 64, 20_000  # documents of a source, and characters of each, that are tokenized


def summarize(job_config: JobConfig, world_size: int) -> str:
    """The page of a job. Raises UserError for everything that would keep the job from starting."""
    logger.setLevel("WARNING")
    logging.getLogger("torch._subclasses.fake_tensor").setLevel("CRITICAL")  # the page says what cannot be traced
    job_config = copy.deepcopy(job_config)
    # Nothing is downloaded or converted; when the hub is offline, everything is here already.
    job_config.training.streaming |= not HF_HUB_OFFLINE
    register(job_config)
    spec = get_train_spec(job_config.model.name)
    args: Any = spec.model_args[job_config.model.flavor]
    tokenizer = spec.build_tokenizer_fn(job_config)
    args.update_from_config(job_config)
    with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[job_config.training.dtype]):
        model: Any = spec.model_cls(args)
    parameters, flops = args.get_nparams_and_flops(model, job_config.training.seq_len)
    modes = measure_modes(spec, job_config)
    memory = {mode: estimate(parts, job_config, world_size) for mode, parts in modes.items()}
    training, dp = job_config.training, dp_degree(job_config.parallelism, world_size)
    sequences = max(training.global_batch_size, training.local_batch_size * dp)
    tokens = sequences * training.seq_len * training.steps
    sections = [
        _job(job_config, world_size, args, parameters, flops, tokens),
        "\n".join([_memory(memory, job_config), *_caveats(modes["none"].untraceable, model, job_config)]),
        _stages(model, memory, job_config),
        _data(build_sources(job_config.training, job_config.data), tokenizer, tokens),
        _learning_rate(job_config),
        _disk(parameters, job_config),
        _time(flops * tokens, world_size, job_config.job.mfu),
    ]
    return "\n\n".join(sections)


def _job(job_config: JobConfig, world_size: int, args: Any, parameters: int, flops: int, tokens: int) -> str:
    model, layout, training = job_config.model, job_config.parallelism, job_config.training
    degrees = {
        "data": dp_degree(layout, world_size),
        "replicas (within data)": layout.data_parallel_replicate_degree,
        **{kind: getattr(layout, f"{kind}_parallel_degree") for kind in ("tensor", "context", "pipeline")},
    }
    if layout.expert_parallel_degree > 1:
        degrees["expert (within data)"] = layout.expert_parallel_degree
    titan = f"torchtitan's {model.name} {model.flavor}"
    rows = [
        ("model", f"{model.config} ({args.hf_config.model_type})" if model.name == "auto" else titan),
        ("parameters", f"{parameters:,}"),
        ("FLOPs per token", f"{flops:,}"),
        ("ranks", f"{world_size:,}: " + ", ".join(f"{name} {degree}" for name, degree in degrees.items())),
        ("tokens per step", f"{tokens // training.steps:,}"),
        ("tokens", f"{tokens:,} in {training.steps:,} steps"),
    ]
    return _table(rows, "job", left=2)


def _memory(memory: dict[str, list[Memory]], job_config: JobConfig) -> str:
    """A column per activation checkpointing mode, each of the rank with the highest peak."""
    mode = job_config.activation_checkpoint.mode
    columns = {name: max(per_rank, key=lambda rank: rank.peak) for name, per_rank in memory.items()}
    highest = list(columns.values())
    rows = [
        ("", *(f"AC {name}" + (" (this job)" if name == mode else "") for name in columns)),
        ("pipeline rank", *(f"{memory[name].index(m)}" for name, m in columns.items())),
        ("parameters", *(f"{m.parameters:,}" for m in highest)),
    ]
    names = [field.name for field in fields(Memory) if field.name != "parameters"]
    rows += [(name.replace("_", " "), *(_gib(getattr(m, name)) for m in highest)) for name in names]
    return _table(rows, "memory of the rank with the highest peak, traced on a CPU (peaks are less than sums)")


def _caveats(untraceable: str, model: Any, job_config: JobConfig) -> Iterator[str]:
    if untraceable:
        yield f"  activations, and so the peak, are a rough estimate: a block cannot be traced ({untraceable})"
    elif job_config.model.name == "auto" and model.family.from_fla:
        yield "  activations are those of the CPU reference kernels; fla's kernels on a GPU keep less"
    if job_config.activation_checkpoint.mode == "memory_budget":
        yield "  activation_checkpoint.mode memory_budget is between the two columns"
    if job_config.compile.enable or job_config.model.converters:
        yield "  what compile and model.converters save is not counted"


def _stages(model: Any, memory: dict[str, list[Memory]], job_config: JobConfig) -> str:
    layout, mode = job_config.parallelism, job_config.activation_checkpoint.mode
    per_rank = memory.get(mode, memory["none"])
    rows: list[Row] = [("stage", "rank", "blocks", "with", "parameters", "per rank", "peak per rank")]
    for stage, names in enumerate(stage_modules(len(model.layers), layout)):
        blocks = [name.removeprefix("layers.") for name in names if name.startswith("layers.")]
        others = " ".join(name for name in names if not name.startswith("layers."))
        rank = stage_rank(stage, layout)
        shown = f"{blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else blocks[0]
        own = per_rank[rank]
        count = count_stage(model, names)
        rows.append((f"{stage}", f"{rank}", shown, others, f"{count:,}", f"{own.parameters:,}", _gib(own.peak)))
    return _table(rows, "pipeline stages", left=4)


def count_stage(model: Any, names: Iterable[str]) -> int:
    """Parameters of a pipeline stage of an unsharded model, given torchtitan's names of its modules."""
    parts = {"tok_embeddings": model.embedding, "norm": model.norm, "output": model.head}
    parts |= {f"layers.{i}": block for i, block in model.layers.items()}
    whole = parts.keys() <= set(names)  # the only stage, which has the backbone's own parameters as well
    owners = [model] if whole else [parts[name] for name in names if parts[name] is not None]
    return sum(parameter.numel() for owner in owners for parameter in owner.parameters())


def _data(sources: list[Source], tokenizer: Any, tokens: int) -> str:
    rows: list[Row] = [("source", "share", "tokens", "rows", "tokens per epoch", "epochs")]
    total = sum(source.weight for source in sources)
    for source in sources:
        share = source.weight / total
        known = 0 if source.streamed else _count_source(source, tokenizer)
        size = ("unknown", "unknown", "unknown")
        if known:
            size = (f"{len(source.rows):,}", f"about {known:,}", f"about {tokens * share / known:.2f}")
        rows.append((source.name, f"{share:.3f}", f"{round(tokens * share):,}", *size))
    return _table(rows, f"data (from {_SAMPLES} documents of each source)")


def _count_source(source: Source, tokenizer: Any) -> int:
    """Tokens of a source, extrapolated from a few documents; 0 if none of them can be read."""
    counts = []
    for document in source.sample(_SAMPLES):
        if isinstance(document, str):
            head = document[:_MAX_CHARACTERS]
            counts.append(len(tokenizer.encode_batch([head])[0]) * len(document) / len(head) + 1)
        elif not isinstance(document, Bad):
            counts.append(len(document) + 1)
    return round(len(source.rows) * sum(counts) / len(counts)) if counts else 0


def _learning_rate(job_config: JobConfig) -> str:
    """The learning rate at a few steps, from the schedule the run would use."""
    last = job_config.training.steps
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=job_config.optimizer.lr)
    factor = build_lr_schedule([optimizer], job_config.lr_scheduler, last).schedulers[0].lr_lambdas[0]
    warm = min(job_config.lr_scheduler.warmup_steps, last)
    after = range(max(warm, 1), last + 1)
    decay = after.start + bisect_left(after, True, key=lambda step: factor(step - 1) < 1)
    steps = {1: "first"}
    for step, what in ((warm, "end of warm-up"), (last // 2, "middle"), (decay, "start of decay"), (last, "last")):
        if 1 <= step <= last:
            steps[step] = f"{steps[step]}, {what}" if step in steps else what
    rows = [("step", "lr", "")]
    rows += [(f"{step:,}", f"{job_config.optimizer.lr * factor(step - 1):.4g}", steps[step]) for step in sorted(steps)]
    return _table(rows, f"learning rate ({job_config.lr_scheduler.decay_type})")


def _disk(parameters: int, job_config: JobConfig) -> str:
    checkpoint, dtype = job_config.checkpoint, job_config.training.dtype
    weights = TORCH_DTYPE_MAP[dtype].itemsize * parameters
    exported = TORCH_DTYPE_MAP[checkpoint.export_dtype].itemsize * parameters
    kept = f"{checkpoint.keep_latest_k} are kept" if checkpoint.keep_latest_k else "all are kept"
    rows = [
        ("checkpoint", _gib((1 + ADAM_STATES) * weights), f"weights and optimizer; {kept}"),
        ("weights alone", _gib(weights), dtype),
        ("Hugging Face export", _gib(exported), checkpoint.export_dtype),
    ]
    return _table(rows, "on disk")


def _time(flops: int, world_size: int, assumed_mfu: float | None) -> str:
    name, peak, example = "H100", 989e12, ", as an example"  # for a machine without a GPU, or with an unknown one
    own = torch.get_device_module().get_device_name() if torch.accelerator.is_available() else ""
    if own and (known := known_peak_flops(own)):
        name, peak, example = own, known, ""
    rows = [("MFU", "hours", "days")]
    for mfu in (0.3, 0.4, 0.5) if assumed_mfu is None else (assumed_mfu,):
        hours = flops / (world_size * peak * mfu) / 3600
        rows.append((f"{100 * mfu:.3g}%", f"{hours:,.2f}", f"{hours / 24:,.2f}"))
    return _table(rows, f"time on {world_size:,} {name}{example} ({peak / 1e12:,.0f} TFLOPS each)")


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _table(rows: Sequence[Row], title: str, left: int = 1) -> str:
    """A title above rows in aligned columns; the first `left` are aligned left, the rest right."""
    return "\n".join([title, *(f"  {line}" for line in align(rows, range(left, len(rows[0]))))])
