"""The dry run: what a job would train and need, on any number of ranks, with no rank, no weights and no folder."""

import copy
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_module, device_type, get_peak_flops, set_default_dtype

from flame.data.document import Bad
from flame.data.source import Source, build_sources
from flame.dry_run.memory import Memory, estimate, measure_modes, stage_modules
from flame.parallel.layout import dp_degree
from flame.parallel.pipeline_schedule import stage_rank
from flame.training.lr_schedule import build_schedule
from flame.training.train_spec import register

Row = tuple[str, ...]
_SAMPLE, _LONGEST = 64, 20_000  # documents of a source, and characters of each, that tell how long it is in tokens
_MFU = (0.3, 0.4, 0.5)


def describe(job_config: Any, ranks: int) -> str:
    """The page of a job on so many ranks. Raises UserError for all that would keep the job from starting."""
    logger.setLevel("WARNING")
    logging.getLogger("torch._subclasses.fake_tensor").setLevel("CRITICAL")  # the page says what could not be run
    job_config = copy.deepcopy(job_config)
    # Nothing is downloaded or converted; where the hub is out of reach, everything is here already.
    job_config.training.streaming |= not HF_HUB_OFFLINE
    register(job_config)
    spec = get_train_spec(job_config.model.name)
    args: Any = spec.model_args[job_config.model.flavor]
    tokenizer = spec.build_tokenizer_fn(job_config)
    args.update_from_config(job_config)
    with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[job_config.training.dtype]):
        model: Any = spec.model_cls(args)
    parameters, flops = args.get_nparams_and_flops(model, job_config.training.seq_len)
    modes = measure_modes(spec, job_config, ranks)
    memory = {mode: estimate(parts, job_config, ranks) for mode, parts in modes.items()}
    sections = [
        _job(job_config, ranks, args, parameters, flops),
        "\n".join([_memory(memory, job_config), *_notes(modes["none"].guessed, model, job_config)]),
        _stages(model, memory, job_config),
        _data(build_sources(job_config.training, job_config.data), tokenizer, _tokens(job_config, ranks)),
        _rates(job_config),
        _disk(parameters, job_config),
        _time(flops * _tokens(job_config, ranks), ranks, job_config.job.mfu),
    ]
    return "\n\n".join(sections)


def _job(job_config: Any, ranks: int, args: Any, parameters: int, flops: int) -> str:
    model, layout, training = job_config.model, job_config.parallelism, job_config.training
    tokens = _tokens(job_config, ranks)
    degrees = {
        "data": f"{dp_degree(layout, ranks)}",
        "of which replicas": layout.data_parallel_replicate_degree,
        "tensor": layout.tensor_parallel_degree,
        "context": layout.context_parallel_degree,
        "pipeline": layout.pipeline_parallel_degree,
    }
    if layout.expert_parallel_degree > 1:
        degrees["expert (within data)"] = layout.expert_parallel_degree
    own = f"torchtitan's {model.name} {model.flavor}"
    rows = [
        ("model", f"{model.config} ({args.hf_config.model_type})" if model.name == "auto" else own),
        ("parameters", f"{parameters:,}"),
        ("FLOPs per token", f"{flops:,}"),
        ("ranks", f"{ranks:,}: " + ", ".join(f"{name} {degree}" for name, degree in degrees.items())),
        ("tokens per step", f"{tokens // training.steps:,}"),
        ("tokens", f"{tokens:,} in {training.steps:,} steps"),
    ]
    return _table(rows, "job", left=2)


def _memory(memory: dict[str, list[Memory]], job_config: Any) -> str:
    """A column for each mode of activation checkpointing, of the rank whose peak is highest under it."""
    mode = job_config.activation_checkpoint.mode
    heaviest = {name: max(ranks, key=lambda rank: rank.peak) for name, ranks in memory.items()}
    columns = list(heaviest.values())
    rows = [
        ("", *(f"AC {name}" + (" (this job)" if name == mode else "") for name in heaviest)),
        ("pipeline rank", *(f"{ranks.index(m)}" for ranks, m in zip(memory.values(), columns, strict=True))),
        ("parameters", *(f"{m.parameters:,}" for m in columns)),
        ("weights", *(_gib(m.weights) for m in columns)),
        ("gradients", *(_gib(m.gradients) for m in columns)),
        ("optimizer states", *(_gib(m.optimizer) for m in columns)),
        ("communication", *(_gib(m.buffers) for m in columns)),
        ("activations", *(_gib(m.activations) for m in columns)),
        ("logits and loss", *(_gib(m.head) for m in columns)),
        ("peak", *(_gib(m.peak) for m in columns)),
    ]
    return _table(rows, f"memory of the fullest rank, run on {device_type} (its peak is less than the sum)")


def _notes(guessed: str, model: Any, job_config: Any) -> Iterator[str]:
    if guessed:
        yield f"  activations, so the peak too, are a rough guess: a block cannot be run without values ({guessed})"
    elif device_type == "cpu" and job_config.model.name == "auto" and model.family.from_fla:
        yield "  activations are those of the CPU's references; fla's kernels on a GPU keep less"
    if job_config.activation_checkpoint.mode == "memory_budget":
        yield "  activation_checkpoint.mode memory_budget lies between the two columns"
    if job_config.compile.enable or job_config.model.converters:
        yield "  what compile and model.converters save is not counted"


def _stages(model: Any, memory: dict[str, list[Memory]], job_config: Any) -> str:
    layout, mode = job_config.parallelism, job_config.activation_checkpoint.mode
    ranks = memory.get(mode, memory["none"])
    rows: list[Row] = [("stage", "rank", "blocks", "with", "parameters", "on a rank", "peak of the rank")]
    for stage, names in enumerate(stage_modules(len(model.layers), layout)):
        blocks = [int(name.removeprefix("layers.")) for name in names if name.startswith("layers.")]
        others = " ".join(name for name in names if not name.startswith("layers."))
        rank = stage_rank(stage, layout)
        shown = f"{blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else f"{blocks[0]}"
        count = count_stage(model, names)
        rows.append(
            (f"{stage}", f"{rank}", shown, others, f"{count:,}", f"{ranks[rank].parameters:,}", _gib(ranks[rank].peak))
        )
    return _table(rows, "pipeline stages", left=4)


def count_stage(model: Any, names: Iterable[str]) -> int:
    """Parameters of a pipeline stage of a whole model, by torchtitan's names of its modules."""
    parts = {"tok_embeddings": model.embedding, "norm": model.norm, "output": model.head}
    parts |= {f"layers.{i}": block for i, block in model.layers.items()}
    if parts.keys() <= set(names):  # one stage, which has the backbone's own parameters as well
        return sum(p.numel() for p in model.parameters())
    return sum(p.numel() for name in names if (part := parts[name]) is not None for p in part.parameters())


def _data(sources: list[Source], tokenizer: Any, tokens: int) -> str:
    rows: list[Row] = [("source", "share", "tokens", "rows", "tokens in all", "epochs")]
    whole = sum(source.weight for source in sources)
    for source in sources:
        share = source.weight / whole
        known = None if source.streamed else _length(source, tokenizer)
        size = ("unknown", "unknown", "unknown")
        if known:
            size = (f"{len(source.rows):,}", f"about {known:,}", f"about {tokens * share / known:.2f}")
        rows.append((source.name, f"{share:.3f}", f"{round(tokens * share):,}", *size))
    return _table(rows, f"data (from {_SAMPLE} documents of each source)")


def _length(source: Source, tokenizer: Any) -> int:
    """Tokens of a source, from a few of its documents; 0 if none of them can be read."""
    counts = []
    for document in source.sample(_SAMPLE):
        if isinstance(document, str):
            head = document[:_LONGEST]
            counts.append(len(tokenizer.encode_batch([head])[0]) * len(document) / len(head) + 1)
        elif not isinstance(document, Bad):
            counts.append(len(document) + 1)
    return round(len(source.rows) * sum(counts) / len(counts)) if counts else 0


def _rates(job_config: Any) -> str:
    """The learning rate of a few steps, from the schedule the run would use."""
    last = job_config.training.steps
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=job_config.optimizer.lr)
    factor = build_schedule([optimizer], job_config.lr_scheduler, last).schedulers[0].lr_lambdas[0]
    warm = min(job_config.lr_scheduler.warmup_steps, last)
    low, high = max(warm, 1), last + 1  # the first step behind warm-up whose rate is not the whole
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if factor(middle - 1) < 1 else (middle + 1, high)
    steps = {1: "first"}
    for step, what in ((warm, "end of warm-up"), (last // 2, "middle"), (low, "start of decay"), (last, "last")):
        if 1 <= step <= last:
            steps[step] = f"{steps[step]}, {what}" if step in steps else what
    rows = [("step", "lr", "")]
    rows += [(f"{step:,}", f"{job_config.optimizer.lr * factor(step - 1):.4g}", steps[step]) for step in sorted(steps)]
    return _table(rows, f"learning rate ({job_config.lr_scheduler.decay_type})")


def _disk(parameters: int, job_config: Any) -> str:
    checkpoint, size = job_config.checkpoint, TORCH_DTYPE_MAP[job_config.training.dtype].itemsize
    kept = f"{checkpoint.keep_latest_k} are kept" if checkpoint.keep_latest_k else "all are kept"
    rows = [
        ("checkpoint", _gib(3 * size * parameters), f"weights and optimizer; {kept}"),
        ("weights alone", _gib(size * parameters), job_config.training.dtype),
        (
            "Hugging Face export",
            _gib(TORCH_DTYPE_MAP[checkpoint.export_dtype].itemsize * parameters),
            checkpoint.export_dtype,
        ),
    ]
    return _table(rows, "on disk")


def _time(flops: int, ranks: int, given: float | None) -> str:
    name = device_module.get_device_name() if device_type != "cpu" else "H100"
    peak = get_peak_flops(name) if device_type != "cpu" else 989e12
    rows = [("MFU", "hours", "days")]
    for mfu in _MFU if given is None else (given,):
        hours = flops / (ranks * peak * mfu) / 3600
        rows.append((f"{100 * mfu:.3g}%", f"{hours:,.2f}", f"{hours / 24:,.2f}"))
    example = "" if device_type != "cpu" else ", as an example"
    return _table(rows, f"time on {ranks:,} {name}{example} ({peak / 1e12:,.0f} TFLOPS each)")


def _tokens(job_config: Any, ranks: int) -> int:
    """Tokens of the whole job."""
    training = job_config.training
    batch = training.global_batch_size
    if batch < 0:
        batch = training.local_batch_size * dp_degree(job_config.parallelism, ranks)
    return batch * training.seq_len * training.steps


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _table(rows: Iterable[Row], title: str, left: int = 1) -> str:
    """A title, and rows below it in aligned columns, the first `left` of which begin at the left."""
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    )
    return "\n".join([title, *(f"  {line}".rstrip() for line in lines)])
