"""Where a job starts: the rules that are asked before it is launched and again on its ranks. Imports no torch."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli

from flame.checkpoint.commit import find_corruption, is_resumable, is_unfinished, scan_checkpoints
from flame.config.parser import recorded, to_toml
from flame.errors import UserError

_NAMES = ("job.dump_folder", "job.config_file", "job.description", "checkpoint.folder")  # nothing of what is trained
_ONLY_AT_FIRST = "checkpoint.initial_load_"


@dataclass(frozen=True)
class StartPlan:
    """How a job starts; steps: the checkpoints to resume from, the first that is whole, newest first."""

    mode: Literal["resume", "init", "scratch"]
    steps: tuple[int, ...] = ()


def plan_start(job_config: Any) -> StartPlan:
    """How a job with these settings starts. A model alone, as last_save_model_only saves it, can be its last step only.

    Raises UserError where what is asked for cannot be, or would leave out or overwrite what is there.
    """
    config, last_step = job_config.checkpoint, job_config.training.steps
    folder = Path(job_config.job.dump_folder, config.folder)
    asked, path = config.start, config.initial_load_path
    if not config.enable:
        if asked in ("resume", "init"):
            raise UserError(f"--checkpoint.start: found {asked}, but checkpoint.enable is false")
        if path:
            raise UserError(f"--checkpoint.initial_load_path: found {path}, but checkpoint.enable is false")
        return StartPlan("scratch")
    found = scan_checkpoints(folder)
    steps = [step for step, reason in found.items() if reason is None]
    broken = {step: reason for step, reason in found.items() if reason}
    if config.load_step >= 0 and not already_rewound(job_config):
        return _choose_step(config, folder, last_step, steps, broken)
    if asked == "init" and not path:
        raise UserError("--checkpoint.start: found init, but --checkpoint.initial_load_path is not set")
    if asked == "scratch" and path:
        raise UserError(f"--checkpoint.start: found scratch, but --checkpoint.initial_load_path is {path}")
    if steps and asked in ("init", "scratch"):
        raise UserError(f"--checkpoint.start: found {asked}, but there is {folder}/step-{steps[-1]}; move it away")
    if later := [step for step in reversed(steps) if step > 0]:
        check_resumable(folder / f"step-{later[0]}", last_step)
        _check_load_only(config, folder / f"step-{later[0]}", last_step)
        return StartPlan("resume", tuple(later))
    if not _may_begin(config, folder, broken):
        reasons = "; ".join(f"step-{step}: {reason}" for step, reason in broken.items())
        raise UserError(
            f"--checkpoint.folder: no complete checkpoint in {folder} ({reasons}); move it away to start anew"
        )
    if steps:  # a model to begin with
        return StartPlan("resume", (0,))
    if asked == "resume":
        raise UserError(f"--checkpoint.start: found resume, but there is no complete checkpoint in {folder}")
    if path and not config.initial_load_in_hf and (reason := find_corruption(Path(path))):
        raise UserError(
            f"--checkpoint.initial_load_path: found {path}, must be a whole RUN/checkpoint/step-N: {reason}"
        )
    return StartPlan("init" if path else "scratch")


def check_resumable(checkpoint: Path, last_step: int) -> None:
    """Raises UserError for a checkpoint of a model alone, unless there is no step to do after it."""
    if step_of(checkpoint) < last_step and not is_resumable(checkpoint):
        raise UserError(
            f"--checkpoint.last_save_model_only: {checkpoint} holds the model alone and cannot be resumed; go on "
            "from one before it with --checkpoint.load_step, or start another run from it with "
            "--checkpoint.initial_load_path"
        )


def already_rewound(job_config: Any) -> bool:
    """Whether this very job, started before, went back to its checkpoint.load_step, from which it now goes on."""
    run = Path(job_config.job.dump_folder)
    try:
        start = json.loads((run / "status.json").read_bytes())["start"]
        again = (run / "config.toml").read_text() == to_toml(recorded(job_config))
        return again and start["load_step"] == job_config.checkpoint.load_step
    except (OSError, ValueError, KeyError, TypeError):  # no run folder as yet, or what is left of one
        return False


def _check_load_only(config: Any, checkpoint: Path, last_step: int) -> None:
    if config.load_only and step_of(checkpoint) < last_step:
        raise UserError(
            "--checkpoint.load_only: found true, but --job.dump_folder has a run's own checkpoints, and its records "
            "would give way to those of steps that are not saved; give another folder, and "
            f"--checkpoint.initial_load_path {checkpoint}"
        )


def check_orphaned_checkpoints(config: Any, run: Path) -> None:
    """Raises UserError if a start anew in a run folder leaves out the checkpoints that its config.toml speaks of.

    config: as in `plan_start`. The run's records would give way to those of another run.
    """
    try:
        recorded = tomli.loads((run / "config.toml").read_text())
    except (OSError, ValueError):  # no run folder as yet, or not one of ours
        return
    folder = run / recorded.get("checkpoint", {}).get("folder", config.folder)
    if steps := scan_checkpoints(folder):
        asked = f"folder: found {config.folder}" if config.enable else "enable: found false"
        raise UserError(
            f"--checkpoint.{asked}, but the run in {run} has checkpoints, {folder}/step-{max(steps)}, and would begin "
            "anew; give another --job.dump_folder"
        )


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


def _choose_step(config: Any, folder: Path, last_step: int, steps: list[int], broken: Mapping[int, str]) -> StartPlan:
    step, asked = config.load_step, config.start
    if asked in ("init", "scratch"):
        raise UserError(f"--checkpoint.load_step: found {step}, must be -1 with --checkpoint.start {asked}")
    if step not in steps:
        found = f"steps there: {', '.join(map(str, steps))}" if steps else "there is none at all"
        why = f" ({broken[step]})" if step in broken else ""
        raise UserError(f"--checkpoint.load_step: no whole step-{step} in {folder}{why}, {found}")
    if step > 0:
        check_resumable(folder / f"step-{step}", last_step)
        _check_load_only(config, folder / f"step-{step}", last_step)
    return StartPlan("resume", (step,))


def _may_begin(config: Any, folder: Path, broken: Mapping[int, str]) -> bool:
    """Whether all that is broken is the first save, cut short: more were whole once, and are not to be forgotten."""
    first_save = config.interval if config.interval_type == "steps" else math.inf
    return not broken or (
        len(broken) == 1 and all(0 < step <= first_save and is_unfinished(folder / f"step-{step}") for step in broken)
    )


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
