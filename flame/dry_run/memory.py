"""The memory of each pipeline rank, in bytes: its parts, and what FSDP2, AdamW and pipeline schedules hold."""

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.protocols.train_spec import TrainSpec

from flame.config.schema import JobConfig
from flame.dry_run.activation import ModelParts, ModulePart, measure
from flame.parallel import pipeline_schedule
from flame.parallel.layout import dp_degree, fsdp_degree, module_fqns, reshard_policy, stages, uses_fsdp

ADAM_STATES = 2  # of the size of the weights each; torchtitan 0.2.2 has Adam and AdamW only


@dataclass(frozen=True)
class Memory:
    """The memory of one rank at its peak, in bytes but for `parameters`.

    communication: gathered parameters, and gradients in reduction; activations: of all microbatches in flight; peak:
    less than the sum, as gradients are created while activations are freed.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer_states: int
    communication: int
    activations: int
    logits_and_loss: int
    peak: int


def stage_modules(blocks: int, layout: Any) -> list[list[str]]:
    """torchtitan's names of the modules of each pipeline stage; one stage without a pipeline."""
    return stages(blocks, layout) if layout.pipeline_parallel_degree > 1 else [module_fqns(blocks)]


def measure_modes(spec: TrainSpec, job_config: JobConfig, gpu_loss: bool = True) -> dict[str, ModelParts]:
    """The parts under each activation checkpointing mode worth comparing: none, the job's own, and full."""
    ac = job_config.activation_checkpoint
    by_op = ac.mode == "selective" and ac.selective_ac_option == "op"
    modes = ("none", "full", *(["selective"] if by_op else []))
    found = {mode: measure(spec, job_config, mode, gpu_loss) for mode in modes}
    if ac.mode == "selective" and not by_op:  # every n-th block as a whole
        every = int(ac.selective_ac_option) or 1
        pairs = zip(found["none"].blocks, found["full"].blocks, strict=True)
        blocks = [full if i % every == 0 else none for i, (none, full) in enumerate(pairs, 1)]
        found["selective"] = replace(found["none"], blocks=blocks)
    return {mode: found[mode] for mode in ("none", "selective", "full") if mode in found}


def estimate(parts: ModelParts, job_config: JobConfig, world_size: int) -> list[Memory]:
    """The memory of each pipeline rank, on its first data-parallel rank, which holds the most."""
    layout = job_config.parallelism
    named = {"tok_embeddings": parts.embedding, "output": parts.head}
    named |= {f"layers.{i}": block for i, block in enumerate(parts.blocks)}
    held: list[list[list[ModulePart]]] = [[] for _ in range(layout.pipeline_parallel_degree)]
    for stage, names in enumerate(stage_modules(len(parts.blocks), layout)):
        held[pipeline_schedule.stage_rank(stage, layout)].append([named[name] for name in names if name in named])
    return [_estimate_rank(own, parts, rank, job_config, world_size) for rank, own in enumerate(held)]


def _estimate_rank(
    own: list[list[ModulePart]], parts: ModelParts, rank: int, job_config: JobConfig, world_size: int
) -> Memory:
    """Walks the parts of a pipeline rank's stages forward and backward, as autograd does in the last microbatch."""
    training, layout = job_config.training, job_config.parallelism
    pipeline, shards = layout.pipeline_parallel_degree, fsdp_degree(layout, world_size)
    flat = [part for stage in own for part in stage]
    size, expert_degree = TORCH_DTYPE_MAP[training.dtype].itemsize, layout.expert_parallel_degree
    parameters = sum(part.numel(shards, expert_degree) for part in flat)
    weights = size * parameters
    saved = sum(part.saved for part in flat)
    microbatches = pipeline_schedule.num_microbatches(job_config) if pipeline > 1 else 1
    in_flight = (_in_flight(layout, rank, microbatches, len(own)) - 1) * saved // len(own)  # but for the last one
    fixed = 0
    if pipeline > 1:  # a stage's buffers for the hidden states of each microbatch, and for their gradients
        ends = sum(part is parts.embedding or part is parts.head for part in flat)
        fixed += microbatches * parts.embedding.saved * (2 * len(own) - ends)
    buffers = [(0, 0)] * len(flat)
    if uses_fsdp(job_config, world_size):
        keeps = reshard_policy(job_config, shards, parts.parameters) == "never"
        buffers = _fsdp_buffers(flat, job_config, microbatches, shards, keeps)

    batch = training.local_batch_size * dp_degree(layout, world_size)
    accumulated = pipeline > 1 or training.global_batch_size > batch  # gradients exist before the last microbatch
    live = (1 + ADAM_STATES) * weights + fixed + in_flight + (weights if accumulated else 0)
    foreach = job_config.optimizer.implementation == "foreach"
    peaks = [(2 + ADAM_STATES) * weights + fixed + (weights if foreach else 0)]  # in the optimizer's step
    for part, (forward, _) in zip(flat, buffers, strict=True):
        peaks.append(live + part.forward + forward)
        live += part.saved
    for part, (_, backward) in reversed(list(zip(flat, buffers, strict=True))):
        peaks.append(live + part.backward + backward)
        live += (0 if accumulated else size * part.numel(shards, expert_degree)) - part.saved
    head = parts.head if parts.head in flat else None
    return Memory(
        parameters=parameters,
        weights=weights,
        gradients=weights,
        optimizer_states=ADAM_STATES * weights,
        communication=fixed + max(max(pair) for pair in buffers),
        activations=saved + in_flight - (head.saved if head else 0),
        logits_and_loss=max(head.forward, head.saved + head.backward) if head else 0,
        peak=max(peaks),
    )


def _in_flight(layout: Any, rank: int, microbatches: int, stages_here: int) -> int:
    """Microbatches x stages whose activations a rank holds at once; all of them for a schedule without a formula."""
    degree, every = layout.pipeline_parallel_degree, microbatches * stages_here
    if degree == 1:
        return 1
    name = None if layout.pipeline_parallel_schedule_csv else pipeline_schedule.get_schedule(layout).name
    if name == "1F1B":
        return min(every, degree - rank)
    if name == "Interleaved1F1B":
        per_round = microbatches // max(1, microbatches // degree)
        return min(every, (stages_here - 1) * per_round + 2 * (degree - 1 - rank) + 1)
    return every


def _fsdp_buffers(
    flat: list[ModulePart], job_config: JobConfig, microbatches: int, shards: int, keeps: bool
) -> list[tuple[int, int]]:
    """What FSDP2 holds gathered or is reducing during the forward and the backward of each part.

    keeps: whether a part stays gathered from its forward to its backward.
    """
    training, layout = job_config.training, job_config.parallelism
    param, reduce = TORCH_DTYPE_MAP[training.mixed_precision_param], TORCH_DTYPE_MAP[training.mixed_precision_reduce]
    pipeline = layout.pipeline_parallel_degree
    numels = [part.numel(expert_degree=layout.expert_parallel_degree) for part in flat]
    gathered, reduced = ([dtype.itemsize * numel for numel in numels] for dtype in (param, reduce))
    copies = 3 if shards == 1 else 1  # what goes in, its quotient and what comes out, if that is not a shard
    if keeps and pipeline > 1:  # all of it for all microbatches
        held = sum(gathered)
        # Between microbatches a pipeline keeps unsharded gradients, and reduces them after the last one.
        unsharded = sum(reduced) if microbatches > 1 else 0
        return [(held + unsharded, held + unsharded + copies * own) for own in reduced]
    following, previous = [*gathered[1:], 0], [0, *gathered[:-1]]  # FSDP2 prefetches the next part
    if keeps:
        gathered, previous = list(accumulate(gathered)), [0] * len(gathered)  # those before it are there already
    return [
        (own + after, own + before + copies * gradient)
        for own, after, before, gradient in zip(gathered, following, previous, reduced, strict=True)
    ]
