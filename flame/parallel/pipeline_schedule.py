"""The schedules of pipelines: torch's by name, with what each asks of a job, and those a file gives step by step."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from flame.errors import UserError

SCHEDULE = "--parallelism.pipeline_parallel_schedule"


@dataclass(frozen=True)
class Schedule:
    """One of torch's schedules (torch/distributed/pipelining/schedules.py).

    stages: that each rank must have, two of them in a V, None for two or more in turn. `fills`: a batch must have a
    microbatch for every stage. `rounds`: it goes in rounds of one length, of as many microbatches as ranks or a few
    more. `halves`: the backward is done in two, which torch does not do with compiled blocks.
    """

    name: str
    stages: int | None = None
    fills: bool = False
    rounds: bool = False
    halves: bool = False


SCHEDULES = (
    Schedule("1F1B", stages=1, fills=True),
    Schedule("GPipe", stages=1),
    Schedule("LoopedBFS"),
    Schedule("Interleaved1F1B", rounds=True),
    Schedule("InterleavedZeroBubble", rounds=True, halves=True),
    Schedule("ZBVZeroBubble", stages=2, halves=True),
    Schedule("DualPipeV", stages=2, fills=True, halves=True),
)


def find(layout: Any) -> Schedule:
    """The schedule a job names, whatever the case of its letters. Raises UserError."""
    for schedule in SCHEDULES:
        if schedule.name.lower() == layout.pipeline_parallel_schedule.lower():
            return schedule
    known = ", ".join(schedule.name for schedule in SCHEDULES)
    raise UserError(f"{SCHEDULE}: found {layout.pipeline_parallel_schedule!r}, must be one of {known}")


def stage_rank(stage: int, layout: Any) -> int:
    """The pipeline rank of a stage, as torchtitan places it: round and round, or there and back in a V."""
    degree = layout.pipeline_parallel_degree
    if degree > 1 and find(layout).stages == 2:
        return min(stage, 2 * degree - 1 - stage)
    return stage % degree


def microbatches(job_config: Any) -> int:
    """Microbatches in what a rank takes at a time."""
    return job_config.training.local_batch_size // job_config.parallelism.pipeline_parallel_microbatch_size


def check(job_config: Any) -> None:
    """Refuse a batch, or a compiler, that the schedule cannot have. Imports no torch. Raises UserError."""
    layout, batch = job_config.parallelism, job_config.training.local_batch_size
    schedule, degree, count = find(layout), layout.pipeline_parallel_degree, microbatches(job_config)
    size, wrong = layout.pipeline_parallel_microbatch_size, f"--training.local_batch_size: found {batch}, must"
    if layout.pipeline_parallel_schedule_csv:
        return  # the file's steps are taken instead, which `complain` looks at
    if schedule.fills and count < (stages := (schedule.stages or 1) * degree):
        raise UserError(
            f"{wrong} be {stages * size} or more: {schedule.name} needs a microbatch (of "
            f"parallelism.pipeline_parallel_microbatch_size {size}) for each of {stages} stages"
        )
    if schedule.rounds and count % (rounds := max(1, count // degree)):
        below, above = (number * degree * size for number in (rounds, rounds + 1))
        raise UserError(
            f"{wrong} make rounds of one length for {schedule.name} on {degree} ranks: {below} or {above} would work"
        )
    if schedule.halves and job_config.compile.enable:
        raise UserError(f"--compile.enable: found true, must be false with {schedule.name}, whose backward is in two")


def complain(job_config: Any, stages: int) -> Iterator[str]:
    """What is wrong with the steps of pipeline_parallel_schedule_csv, for a model of so many stages."""
    from torch.distributed.pipelining.schedules import _Action, _add_send_recv, _validate_schedule

    layout, count = job_config.parallelism, microbatches(job_config)
    degree, path = layout.pipeline_parallel_degree, layout.pipeline_parallel_schedule_csv
    if not path:
        return
    wrong = f"{SCHEDULE}_csv: {path}"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [[_Action.from_str(cell) for cell in row] for row in csv.reader(file)]
    except (OSError, UnicodeDecodeError, csv.Error, RuntimeError) as error:  # the last is torch's, of a step
        yield f"{wrong} cannot be read: {' '.join(str(error).split())}"
        return
    if len(rows) != degree:
        yield f"{wrong} has {len(rows)} rows, must have {degree}, one for each pipeline rank"
        return
    whole = {rank: [cell for cell in row if cell] for rank, row in enumerate(rows)}  # an empty cell waits
    seen = set()
    for rank, row in whole.items():
        for step in (step for cell in row for step in cell.sub_actions or (cell,)):
            kind, stage, number = step.computation_type.value, step.stage_index, step.microbatch_index
            if kind not in ("F", "B", "I", "W"):
                yield f"{wrong} has {step}, must have no steps but F, B, I and W"
            elif stage >= stages or stage_rank(stage, layout) != rank:
                own = ", ".join(f"{i}" for i in range(stages) if stage_rank(i, layout) == rank)
                yield f"{wrong} has {step} in row {rank + 1}, whose rank has the stages {own}"
            elif number is None or number >= count:
                yield f"{wrong} has {step}, and the job's microbatches are 0 to {count - 1}"
            elif step in seen:
                yield f"{wrong} has {step} twice"
            elif kind == "I" and job_config.compile.enable:
                yield f"--compile.enable: found true, must be false with {path}, which has a backward in two ({step})"
            seen.add(step)
    for step in (f"{stage}F{number}" for stage in range(stages) for number in range(count)):
        if _Action.from_str(step) not in seen:
            yield f"{wrong} has no {step}, and must have {count} microbatches (of pipeline_parallel_microbatch_size)"
    try:
        _validate_schedule(whole, degree, stages, count)
        _add_send_recv(whole, lambda stage: stage_rank(stage, layout), stages)
    except AssertionError as error:
        yield f"{wrong}: {str(error).splitlines()[0]}"


def without_overlap(job_config: Any) -> Any:
    """The job whose DualPipeV does one thing at a time.

    torchtitan 0.2.2 has a thread do the backward beside the forward, to hide how experts that are divided communicate.
    Of other models there is nothing to hide, and the threads would draw from one generator of random numbers and lose
    what one of them raises; its own switch (pipeline_parallel_expert_parallel_overlap) does not ask which model it is.
    """
    return replace(
        job_config, parallelism=replace(job_config.parallelism, pipeline_parallel_expert_parallel_overlap=False)
    )
