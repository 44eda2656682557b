"""The memory of each pipeline rank, in bytes: what its parts take, and what FSDP2, DDP, Adam and schedules hold."""

from dataclasses import dataclass, replace
from typing import Any

from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.protocols.train_spec import TrainSpec

from flame.dry_run.activation import Part, Parts, measure
from flame.parallel import pipeline_schedule
from flame.parallel.layout import dp_degree, fsdp_degree, module_fqns, stages


@dataclass(frozen=True)
class Memory:
    """Of one rank, its largest: all in bytes but `parameters`.

    buffers: gathered parameters and gradients under way; activations: of all microbatches in flight; head: the loss;
    peak: the most at one time, less than the sum, as gradients come while activations go.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    head: int
    peak: int


def stage_modules(blocks: int, layout: Any) -> list[list[str]]:
    """torchtitan's names of the modules of every pipeline stage; all in one without a pipeline."""
    if layout.pipeline_parallel_degree > 1:
        return stages(blocks, layout)
    return [module_fqns(blocks)]


def measure_modes(spec: TrainSpec, job_config: Any, ranks: int) -> dict[str, Parts]:
    """The parts under each activation checkpointing worth comparing: none, the job's own, and full."""
    ac = job_config.activation_checkpoint
    found = {mode: measure(spec, job_config, ranks, mode) for mode in ("none", "full")}
    if ac.mode == "selective" and ac.selective_ac_option == "op":
        found["selective"] = measure(spec, job_config, ranks, "selective")
    elif ac.mode == "selective":  # every so many blocks as a whole
        every = int(ac.selective_ac_option) or 1
        pairs = zip(found["none"].blocks, found["full"].blocks, strict=True)
        blocks = [whole if i % every == 0 else kept for i, (kept, whole) in enumerate(pairs, 1)]
        found["selective"] = replace(found["none"], blocks=blocks)
    return {mode: found[mode] for mode in ("none", "selective", "full") if mode in found}


def estimate(parts: Parts, job_config: Any, ranks: int) -> list[Memory]:
    """The memory of the first rank of each pipeline rank, which has the most."""
    layout = job_config.parallelism
    held: list[list[list[Part]]] = [[] for _ in range(layout.pipeline_parallel_degree)]
    for stage, names in enumerate(stage_modules(len(parts.blocks), layout)):
        known = {"tok_embeddings": parts.embedding, "output": parts.head}
        known |= {f"layers.{i}": block for i, block in enumerate(parts.blocks)}
        held[pipeline_schedule.stage_rank(stage, layout)].append([known[name] for name in names if name in known])
    return [_of_rank(own, parts, rank, job_config, ranks) for rank, own in enumerate(held)]


def _of_rank(own: list[list[Part]], parts: Parts, rank: int, job_config: Any, ranks: int) -> Memory:
    """Walks the parts of a rank's stages forward and back, as autograd does in the step's last microbatch."""
    training, layout = job_config.training, job_config.parallelism
    pipeline, divided = layout.pipeline_parallel_degree, fsdp_degree(layout, ranks)
    flat = [part for stage in own for part in stage]
    size, expert = TORCH_DTYPE_MAP[training.dtype].itemsize, layout.expert_parallel_degree
    parameters = sum(part.numel(divided, expert) for part in flat)
    weights = size * parameters
    saved = sum(part.saved for part in flat)
    microbatches = pipeline_schedule.num_microbatches(job_config) if pipeline > 1 else 1
    waiting = (_in_flight(layout, rank, microbatches, len(own)) - 1) * saved // len(own)
    fixed = 0
    if divided == 1 and layout.data_parallel_replicate_degree > 1:
        fixed += weights  # DDP's buckets
    if pipeline > 1:  # a stage has room for the hidden states of each microbatch, and for their gradients
        ends = sum(part is parts.embedding or part is parts.head for part in flat)
        fixed += microbatches * parts.embedding.saved * (2 * len(own) - ends)
    moved = _moved(flat, job_config, microbatches) if divided > 1 else [(0, 0)] * len(flat)

    several = pipeline > 1 or _accumulates(job_config, ranks)
    live = 3 * weights + fixed + waiting + (weights if several else 0)
    update = 4 * weights + fixed + (weights if job_config.optimizer.implementation == "foreach" else 0)
    peaks = [update]
    for part, (forward, _) in zip(flat, moved, strict=True):
        peaks.append(live + part.forward + forward)
        live += part.saved
    for part, (_, backward) in reversed(list(zip(flat, moved, strict=True))):
        peaks.append(live + part.backward + backward)
        live += (0 if several else size * part.numel(divided, expert)) - part.saved
    return Memory(
        parameters=parameters,
        weights=weights,
        gradients=weights,
        optimizer=2 * weights,  # Adam's two moments
        buffers=fixed + max(max(pair) for pair in moved),
        activations=saved + waiting - (parts.head.saved if parts.head in flat else 0),
        head=max(parts.head.forward, parts.head.saved + parts.head.backward) if parts.head in flat else 0,
        peak=max(peaks),
    )


def _accumulates(job_config: Any, ranks: int) -> bool:
    training = job_config.training
    return training.global_batch_size > training.local_batch_size * dp_degree(job_config.parallelism, ranks)


def _in_flight(layout: Any, rank: int, microbatches: int, stages_here: int) -> int:
    """Microbatches times stages whose activations a rank holds at once; all of them in schedules not known better."""
    degree, every = layout.pipeline_parallel_degree, microbatches * stages_here
    if degree == 1:
        return 1
    name = None if layout.pipeline_parallel_schedule_csv else pipeline_schedule.get_schedule(layout).name
    if name == "1F1B":
        return min(every, degree - rank)
    if name == "Interleaved1F1B":
        round_of = microbatches // max(1, microbatches // degree)
        return min(every, (stages_here - 1) * round_of + 2 * (degree - 1 - rank) + 1)
    return every


def _moved(flat: list[Part], job_config: Any, microbatches: int) -> list[tuple[int, int]]:
    """What FSDP2 has gathered or is reducing while each part goes forward, and back."""
    training, layout = job_config.training, job_config.parallelism
    low, wide = (
        TORCH_DTYPE_MAP[name].itemsize for name in (training.mixed_precision_param, training.mixed_precision_reduce)
    )
    pipeline, policy = layout.pipeline_parallel_degree, layout.fsdp_reshard_after_forward
    gathered = [part.numel(expert=layout.expert_parallel_degree) for part in flat]
    whole, reduced = [low * numel for numel in gathered], [wide * numel for numel in gathered]
    if policy == "never" or (policy == "default" and pipeline > 1):
        held = sum(whole)
        # Between microbatches a pipeline keeps whole gradients, and reduces them behind the last one.
        summed = sum(reduced) if pipeline > 1 and microbatches > 1 else 0
        return [(held + summed, held + summed + own) for own in reduced]
    ahead, behind = [*whole[1:], 0], [0, *whole[:-1]]  # the next part is gathered while one is computed
    return [
        (one + after, one + before + own) for one, after, before, own in zip(whole, ahead, behind, reduced, strict=True)
    ]
