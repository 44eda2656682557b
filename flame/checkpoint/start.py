"""How a job starts: the rules, applied before it is launched and again on its ranks. Imports no torch."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli

from flame.checkpoint.commit import Status, inspect_checkpoint, read_marker, scan_checkpoints
from flame.config.files import read_json
from flame.config.parser import recorded, to_toml
from flame.config.record import read_record
from flame.config.schema import Checkpoint, JobConfig
from flame.errors import UserError

_NAMES = ("job.dump_folder", "job.config_file", "job.description", "checkpoint.folder")  # nothing of what is trained
_RECORDED = {"folder": str, "interval": int, "interval_type": str}
_ONLY_AT_FIRST = "checkpoint.initial_load_"


@dataclass(frozen=True)
class StartPlan:
    """How a job starts. Picklable: rank 0 makes it and sends it to the others.

    steps: the checkpoints to resume from, newest first; the first intact one is taken. checkpoints: {step: status} of
    all in the run's checkpoint folder when the plan was made.
    """

    mode: Literal["resume", "init", "scratch"]
    steps: tuple[int, ...] = ()
    checkpoints: Mapping[int, Status] = field(default_factory=dict)


def plan_start(job_config: JobConfig) -> StartPlan:
    """Decide how a job with these settings starts. A checkpoint of the model alone can only be the last step.

    It stats every file of every checkpoint, so one rank plans and sends the plan to the others. Raises UserError if the
    settings contradict each other or what is on disk, or would leave out or overwrite checkpoints.
    """
    config, last_step = job_config.checkpoint, job_config.training.steps
    folder = Path(job_config.job.dump_folder, config.folder)
    asked, path = config.start, config.initial_load_path
    if not config.enable:
        if asked in ("resume", "init"):
            raise UserError("--checkpoint.start", asked, "auto or scratch", "checkpoint.enable is false")
        if path:
            raise UserError("--checkpoint.initial_load_path", path, hint="checkpoint.enable is false")
        return StartPlan("scratch")
    found = scan_checkpoints(folder)
    steps = [step for step in sorted(found, reverse=True) if not found[step].corruption]
    if config.load_step >= 0 and not _already_rewound(job_config):
        steps = [_check_load_step(config, folder, found)]
    else:
        if asked == "init" and not path:
            raise UserError("--checkpoint.start", asked, hint="--checkpoint.initial_load_path is not set")
        if asked == "scratch" and path:
            raise UserError("--checkpoint.start", asked, hint=f"--checkpoint.initial_load_path is {path}")
        if steps and asked in ("init", "scratch"):
            hint = f"{folder} has checkpoints up to step-{steps[0]}; move it away to start anew"
            raise UserError("--checkpoint.start", asked, "auto or resume", hint)
        steps = [step for step in steps if step > 0]
        if not steps:
            _check_restartable(job_config, folder, found)
            if 0 not in found or found[0].corruption:
                return StartPlan(_choose_beginning(config, folder), checkpoints=found)
            steps = [0]  # a model to begin with
    for step in filter(None, steps):  # a copy called step-0 is a model to begin with
        if (saved := read_marker(folder / f"step-{step}").get("step", step)) != step:
            raise UserError(str(folder / f"step-{step}"), f"step {saved}", f"called step-{saved}, or moved away")
    if steps[0] > 0:
        checkpoint = folder / f"step-{steps[0]}"
        check_resumable(checkpoint, found[steps[0]], last_step)
        if config.load_only and steps[0] < last_step:
            hint = "its records would be replaced; use another --job.dump_folder, with --checkpoint.initial_load_path "
            raise UserError("--checkpoint.load_only", "true", "false to resume this run", f"{hint}{checkpoint}")
    return StartPlan("resume", tuple(steps), found)


def check_resumable(checkpoint: Path, status: Status, last_step: int) -> None:
    """Raises UserError if the checkpoint holds the model alone and there are steps to do after it."""
    if step_of(checkpoint) < last_step and not status.resumable:
        found = "the model alone (--checkpoint.last_save_model_only)"
        hint = "use --checkpoint.load_step, or --checkpoint.initial_load_path in another --job.dump_folder"
        raise UserError(str(checkpoint), found, "a full checkpoint to be resumed", hint)


def check_orphaned_checkpoints(config: Checkpoint, run: Path) -> None:
    """Raises UserError if a run folder's config.toml names a folder of checkpoints that a new start would leave out.

    The run's records would give way to those of another run.
    """
    if not (before := _read_recorded(run)):
        return
    folder = Path(run, before.get("folder") or config.folder)
    if config.enable and os.path.realpath(folder) == os.path.realpath(run / config.folder):
        return  # `plan_start` has decided
    if steps := [step for step, status in scan_checkpoints(folder).items() if not status.unfinished]:
        name, found = ("folder", config.folder) if config.enable else ("enable", "false")
        hint = f"the run has checkpoints, {folder}/step-{max(steps)}, and would begin anew"
        raise UserError(f"--checkpoint.{name}", found, hint=f"{hint}; give another --job.dump_folder")


def check_places(job_config: JobConfig, plan: StartPlan) -> None:
    """Raises UserError for a file in the place of a checkpoint that the run may save: a stop saves at any step."""
    config, begin = job_config.checkpoint, max(plan.steps, default=0)
    if not config.enable or config.load_only:
        return
    for path in sorted(Path(job_config.job.dump_folder, config.folder).glob("step-*")):
        name = re.fullmatch(r"step-([1-9]\d*)", path.name)
        if name and path.is_file() and begin < int(name[1]) <= job_config.training.steps:
            raise UserError(str(path), "a file", "moved away: the run may save a checkpoint there")


def _read_recorded(run: Path) -> dict[str, Any]:
    """The settings of checkpoints that a run folder's config.toml holds; {} without one that a run wrote."""
    known = (read_record(run) or {}).get("checkpoint", {})
    return {name: known[name] for name, kind in _RECORDED.items() if isinstance(known.get(name), kind)}


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint of a run, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def changed_settings(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """A line for each setting of a checkpoint's config that is another today, and what becomes of it."""
    before, after = dict(_flatten(was)), dict(_flatten(now))
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path) and path not in _NAMES:
            used = "not used by a run that resumes" if path.startswith(_ONLY_AT_FIRST) else "applied"
            yield f"{path} {before.get(path, 'none')} -> {after.get(path, 'none')}, {used}"


def _already_rewound(job_config: JobConfig) -> bool:
    """Whether an earlier start of this very job went back to its checkpoint.load_step, from which it now goes on."""
    run = Path(job_config.job.dump_folder)
    was, now = read_record(run), tomli.loads(to_toml(recorded(job_config)))
    if was is None or any(changed_settings(was, now)):
        return False
    try:
        return read_json(run / "status.json")["start"]["load_step"] == job_config.checkpoint.load_step
    except (OSError, ValueError, KeyError, TypeError):  # broken
        return False


def _check_load_step(config: Checkpoint, folder: Path, found: Mapping[int, Status]) -> int:
    step, name = config.load_step, "--checkpoint.load_step"
    if config.start in ("init", "scratch"):
        raise UserError(name, step, f"-1 with --checkpoint.start {config.start}")
    if step not in found or found[step].corruption:
        complete = ", ".join(str(step) for step, status in found.items() if not status.corruption)
        why = f"step-{step}: {found[step].corruption}" if step in found else ""
        raise UserError(name, step, f"a complete checkpoint in {folder}: {complete or 'there is none'}", why)
    return step


def _check_restartable(job_config: JobConfig, folder: Path, found: Mapping[int, Status]) -> None:
    """Raises UserError if a corrupted checkpoint is more than the first save cut short: its run may be worth saving."""
    corrupted = {step: status for step, status in found.items() if status.corruption}
    first = 0 if job_config.checkpoint.create_seed_checkpoint else 1  # a step-0 of other origin may be half copied
    latest = _latest_first_save(job_config)
    if len(corrupted) > 1 or not all(first <= step <= latest and s.unfinished for step, s in corrupted.items()):
        reasons = "; ".join(f"step-{step}: {status.corruption}" for step, status in corrupted.items())
        found_there = f"no complete checkpoint in {folder} ({reasons})"
        raise UserError("--checkpoint.folder", found_there, hint="move it away to start anew")


def _latest_first_save(job_config: JobConfig) -> float:
    """The last step at which the run can have saved first, with today's interval or the one it was started with."""
    config, begin = job_config.checkpoint, 0
    if config.initial_load_path and not config.initial_load_model_only:  # goes on counting from there
        with suppress(ValueError, UserError):
            begin = read_marker(Path(config.initial_load_path)).get("step", 0)
    before = _read_recorded(Path(job_config.job.dump_folder))
    if "seconds" in (config.interval_type, before.get("interval_type")):
        return math.inf
    return begin + max(config.interval, before.get("interval", 0))


def _choose_beginning(config: Checkpoint, folder: Path) -> Literal["init", "scratch"]:
    """How a run without checkpoints begins."""
    path = config.initial_load_path
    if config.start == "resume":
        raise UserError("--checkpoint.start", "resume", hint=f"there is no complete checkpoint in {folder}")
    if path and not config.initial_load_in_hf and (reason := inspect_checkpoint(Path(path)).corruption):
        raise UserError("--checkpoint.initial_load_path", path, "a complete RUN/checkpoint/step-N", reason)
    return "init" if path else "scratch"


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
