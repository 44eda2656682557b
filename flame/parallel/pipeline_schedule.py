"""Pipeline schedules: torch's by name with their constraints, or a CSV file of actions."""

import copy
import csv
from dataclasses import dataclass, replace
from typing import Any, cast

from flame.config.schema import JobConfig
from flame.errors import UserError

SCHEDULE_FLAG = "--parallelism.pipeline_parallel_schedule"


@dataclass(frozen=True)
class PipelineSchedule:
    """A schedule of torch/distributed/pipelining/schedules.py and what it requires.

    stages_per_rank: None is two or more, in loops; 2 is a V. fills_stages: a batch has at least one microbatch per
    stage. equal_rounds: the microbatches divide into rounds of one length, at least the pipeline degree.
    split_backward: gradients of inputs and of weights are separate actions, which torch cannot run on compiled blocks.
    """

    name: str
    stages_per_rank: int | None = None
    fills_stages: bool = False
    equal_rounds: bool = False
    split_backward: bool = False


SCHEDULES = (
    PipelineSchedule("1F1B", stages_per_rank=1, fills_stages=True),
    PipelineSchedule("GPipe", stages_per_rank=1),
    PipelineSchedule("LoopedBFS"),
    PipelineSchedule("Interleaved1F1B", equal_rounds=True),
    PipelineSchedule("InterleavedZeroBubble", equal_rounds=True, split_backward=True),
    PipelineSchedule("ZBVZeroBubble", stages_per_rank=2, split_backward=True),
    PipelineSchedule("DualPipeV", stages_per_rank=2, fills_stages=True, split_backward=True),
)


def get_schedule(layout: Any) -> PipelineSchedule:
    """The schedule that pipeline_parallel_schedule names, in any case. Raises UserError if torch has none such."""
    for schedule in SCHEDULES:
        if schedule.name.lower() == layout.pipeline_parallel_schedule.lower():
            return schedule
    rule = f"one of {', '.join(schedule.name for schedule in SCHEDULES)}"
    raise UserError(SCHEDULE_FLAG, repr(layout.pipeline_parallel_schedule), rule)


def stage_rank(stage: int, layout: Any) -> int:
    """The pipeline rank of a stage, as torchtitan places it: in loops, or in a V for two stages per rank."""
    degree = layout.pipeline_parallel_degree
    if degree > 1 and get_schedule(layout).stages_per_rank == 2:
        return min(stage, 2 * degree - 1 - stage)
    return stage % degree


def num_microbatches(job_config: JobConfig) -> int:
    """Microbatches of a local batch."""
    return job_config.training.local_batch_size // job_config.parallelism.pipeline_parallel_microbatch_size


def validate(job_config: JobConfig) -> None:
    """Check the local batch and the compiler against the schedule; imports no torch.

    Raises UserError if microbatches are too few or make unequal rounds, or if a split backward is compiled.
    """
    layout, batch, count = job_config.parallelism, job_config.training.local_batch_size, num_microbatches(job_config)
    if layout.pipeline_parallel_schedule_csv:
        return  # see validate_csv
    schedule, degree = get_schedule(layout), layout.pipeline_parallel_degree
    size = layout.pipeline_parallel_microbatch_size
    if schedule.fills_stages and count < (stages := (schedule.stages_per_rank or 1) * degree):
        hint = f"{schedule.name} has {stages} stages, each with a microbatch (pipeline_parallel_microbatch_size {size})"
        raise UserError("--training.local_batch_size", batch, f"{stages * size} or more", hint)
    if schedule.equal_rounds and count % (rounds := max(1, count // degree)):
        below, above = (number * degree * size for number in (rounds, rounds + 1))
        rule = f"rounds of equal length for {schedule.name} on {degree} ranks: {below} or {above} would work"
        raise UserError("--training.local_batch_size", batch, rule)
    if schedule.split_backward and job_config.compile.enable:
        raise UserError("--compile.enable", "true", f"false with {schedule.name}", "its backward is split in two")


def validate_csv(job_config: JobConfig, num_stages: int) -> None:
    """Check the actions of pipeline_parallel_schedule_csv for a model of `num_stages`, if it is set.

    Raises UserError if the file is unreadable, an action is missing, repeated or not this job's, or it deadlocks.
    """
    from torch.distributed.pipelining.schedules import _Action, _add_send_recv, _validate_schedule

    layout, count = job_config.parallelism, num_microbatches(job_config)
    degree, path = layout.pipeline_parallel_degree, layout.pipeline_parallel_schedule_csv
    if not path:
        return
    setting = f"{SCHEDULE_FLAG}_csv {path}"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [[_Action.from_str(cell) for cell in row] for row in csv.reader(file)]
    except (OSError, UnicodeDecodeError, csv.Error, RuntimeError) as error:  # the last is torch's, of an action
        raise UserError(setting, hint=f"cannot be read: {' '.join(str(error).split())}") from None
    if len(rows) != degree:
        raise UserError(setting, f"{len(rows)} rows", f"{degree}, one for each pipeline rank")
    actions = {rank: [cell for cell in row if cell] for rank, row in enumerate(rows)}  # an empty cell waits
    seen = set()
    for rank, row in actions.items():
        for action in (action for cell in row for action in cell.sub_actions or (cell,)):
            kind, stage, microbatch = action.computation_type.value, action.stage_index, action.microbatch_index
            if kind not in ("F", "B", "I", "W"):
                raise UserError(setting, action, "of the actions F, B, I and W")
            if stage >= num_stages or stage_rank(stage, layout) != rank:
                own = ", ".join(str(i) for i in range(num_stages) if stage_rank(i, layout) == rank)
                raise UserError(setting, f"{action} in row {rank + 1}", f"of the rank's own stages, {own}")
            if microbatch is None or microbatch >= count:
                raise UserError(setting, action, f"of the job's microbatches, 0 to {count - 1}")
            if action in seen:
                raise UserError(setting, f"{action} twice", "there once")
            if kind == "I" and job_config.compile.enable:
                raise UserError("--compile.enable", "true", f"false with {path}", f"{action} is half a backward")
            seen.add(action)
    for forward in (f"{stage}F{microbatch}" for stage in range(num_stages) for microbatch in range(count)):
        if _Action.from_str(forward) not in seen:
            hint = f"every stage has {count} microbatches (of pipeline_parallel_microbatch_size)"
            raise UserError(setting, f"no {forward}", hint=hint)
    try:
        _validate_schedule(actions, degree, num_stages, count)
        _add_send_recv(actions, lambda stage: stage_rank(stage, layout), num_stages)
    except AssertionError as error:
        raise UserError(setting, hint=str(error).splitlines()[0]) from None


def disable_dualpipev_overlap(job_config: JobConfig) -> JobConfig:
    """The job without `pipeline_parallel_expert_parallel_overlap`, a workaround for torchtitan 0.2.2.

    Upstream: `pipeline_llm` (distributed/pipeline_parallel.py) has DualPipeV run the backward in a thread beside the
    forward, to hide the communication of expert parallelism, whatever the model is. The threads of other models would
    share one random number generator and lose each other's exceptions. Effect: one action at a time.
    """
    changed, layout = copy.copy(job_config), cast(Any, job_config.parallelism)  # mypy does not see torchtitan's fields
    changed.parallelism = replace(layout, pipeline_parallel_expert_parallel_overlap=False)
    return changed
