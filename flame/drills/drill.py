"""The drills: what is done to a job, and what must hold then."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from flame.checkpoint.commit import complete_steps, verify_hashes
from flame.drills.job import FAULT_STEP, INTERVAL, STALL_SECONDS, STEPS, DrillJob, trajectory
from flame.drills.moment import choose
from flame.errors import PREEMPTED

LAST_SAVED = FAULT_STEP // INTERVAL * INTERVAL  # before the fault
RESIZE_TOLERANCE = 1e-4  # of a loss: other ranks add in another order, which AdamW amplifies step by step


class Check(NamedTuple):
    """A claim, whether it holds, and what was found."""

    claim: str
    holds: bool
    found: object = ""


def kill_in_save(folder: Path, world_size: int, flags: list[str], times: int = 3) -> Iterator[Check]:
    """SIGKILL to all ranks, in turn at the start, in the first save, in later ones, in deletions and in the export"""
    flags = [f"--training.steps={10 * times + STEPS}", "--checkpoint.keep_latest_k=2", "--checkpoint.export", *flags]
    baseline, job = _baseline_and_job(folder / "undisturbed", folder / "killed", world_size, flags)
    for number, moment in enumerate(choose(times), 1):
        job.start(moment=moment)
        reached = job.wait_until(job.reached.exists)
        had, step = complete_steps(job.checkpoints), job.last_step()
        job.kill()
        intact = reached and (not had or _newest_is_intact(job))
        saved = f"step-{had[-1]} is intact" if had else "nothing was saved"
        claim = f"kill {number} of {times}, at step {step}, {moment.where}: {saved}"
        yield Check(claim, intact, had if reached else f"the job ended before ({job.last_line()}), see {job.log}")
    yield from _resume(job, baseline)
    steps = job.last_step()
    places = (job.folder, job.folder / "model", job.folder / "hf", *job.checkpoints.glob("step-*"))
    left = [*job.checkpoints.glob(".deleting-*"), *(path for place in places for path in place.glob("*.tmp"))]
    exported = (job.folder / "hf" / f"step-{steps}" / "conversion_report.json").is_file()
    yield Check("the last step is exported, and nothing temporary is left", exported and not left, left)


def sigterm(folder: Path, world_size: int, flags: list[str]) -> Iterator[Check]:
    """SIGTERM to the launcher during training"""
    baseline, job = _baseline_and_job(folder.parent / "undisturbed", folder / "stopped", world_size, flags)
    job.start("Slow")
    job.wait_until(lambda: job.last_step() >= FAULT_STEP)
    job.process.send_signal(signal.SIGTERM)
    code = job.wait()
    yield Check(f"the exit code is {PREEMPTED}", code == PREEMPTED, code)
    yield _check_status(job, "the status is preempted, by SIGTERM", "preempted", "SIGTERM")
    saved, last = max(complete_steps(job.checkpoints), default=0), job.last_step()
    yield Check("the last completed step is saved", saved == last, f"step {saved} of {last}")
    yield from _resume(job, baseline)


def nan(folder: Path, world_size: int, flags: list[str]) -> Iterator[Check]:
    """a gradient of one rank becomes NaN"""
    baseline, job = _baseline_and_job(folder.parent / "undisturbed", folder / "nan", world_size, flags)
    yield _run(job, 1, "NanGradient")
    step = f"step {FAULT_STEP}"
    yield _check_status(job, f"the status names {step} and the parameter", "failed", step, "weight")
    yield _newest_is(job, LAST_SAVED)
    yield from _resume(job, baseline)


def partial(folder: Path, world_size: int, flags: list[str]) -> Iterator[Check]:
    """a byte of the newest checkpoint is flipped, and the one before it is truncated"""
    baseline, job = _baseline_and_job(folder.parent / "undisturbed", folder / "damaged", world_size, flags)
    yield _run(job, 0, stop_at=3 * INTERVAL)
    flipped, truncated = (min((job.checkpoints / f"step-{n * INTERVAL}").glob("*.distcp")) for n in (3, 2))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    truncated.write_bytes(truncated.read_bytes()[:-100])
    yield _run(job, 0)
    output = job.log.read_text()
    for path in (flipped, truncated):
        named = path.parent.name in output and path.name in output
        yield Check(f"the damage to {path.parent.name}/{path.name} is reported", named, job.log)
    yield Check(f"it resumes from step-{INTERVAL}", f"step-{INTERVAL}, step {INTERVAL}," in output, job.log)
    yield _same_trajectory(job, baseline)


def data_end(folder: Path, world_size: int, flags: list[str]) -> Iterator[Check]:
    """the data ends before the last step, at another moment on each rank"""
    flags = ["--data.epochs=1", "--training.steps=100000", *flags]
    job = DrillJob(folder / "ended", world_size, *flags)
    yield _run(job, 0)
    step, status = job.last_step(), job.status()
    ended = (status.get("status"), status.get("step")) == ("data_exhausted", step)
    yield Check("the status is data_exhausted, at the last step", ended, status)
    yield _newest_is(job, step)


def stall(folder: Path, world_size: int, flags: list[str]) -> Iterator[Check]:
    """one rank waits for its data"""
    baseline, job = _baseline_and_job(folder.parent / "undisturbed", folder / "stalled", world_size, flags)
    yield _run(job, 0, "Stall")
    waited = max((record["data/wait_seconds"] for record in job.records()), default=0)
    yield Check(f"data/wait_seconds shows {STALL_SECONDS:g} s or more", waited >= STALL_SECONDS, round(waited, 2))
    yield _same_trajectory(job, baseline)


def resize(folder: Path, world_size: int, flags: list[str]) -> Iterator[Check]:
    """the job resumes with another number of ranks"""
    other = world_size // 2 if world_size > 1 else 2
    baseline, job = _baseline_and_job(folder.parent / "undisturbed", folder / "resized", world_size, flags)
    yield _run(job, 0, stop_at=2 * INTERVAL)
    resized = DrillJob(job.folder, other, *flags)
    yield _run(resized, 0)
    digests = [[record["data_digest"] for record in each.records()] for each in (baseline, resized)]
    yield Check(f"{world_size} and then {other} ranks get the same data at each step", digests[0] == digests[1])
    pairs = zip(baseline.records(), resized.records(), strict=False)
    worst = max((abs(a["loss"] - b["loss"]) for a, b in pairs), default=float("inf"))
    claim = f"every loss is that of {world_size} ranks to {RESIZE_TOLERANCE:g}"
    yield Check(claim, worst <= RESIZE_TOLERANCE, f"{worst:.1e}")


def disk_full(folder: Path, world_size: int, flags: list[str]) -> Iterator[Check]:
    """one rank can no longer write checkpoints"""
    baseline, job = _baseline_and_job(folder.parent / "undisturbed", folder / "full", world_size, flags)
    yield _run(job, 1, "DiskFull")
    yield _check_status(job, "the status says what could not be saved", "failed", "could not be saved")
    yield _newest_is(job, LAST_SAVED)
    yield from _resume(job, baseline)


_ALL = (kill_in_save, sigterm, nan, partial, data_end, stall, resize, disk_full)
DRILLS: dict[str, Callable[..., Iterator[Check]]] = {drill.__name__: drill for drill in _ALL}


def _baseline_and_job(baseline: Path, job: Path, world_size: int, flags: list[str]) -> tuple[DrillJob, DrillJob]:
    """A run without a fault, trained once per folder, and the job to be disturbed. Raises RuntimeError if it fails."""
    whole = DrillJob(baseline, world_size, *flags)
    if whole.status().get("status") != "completed":
        whole.start()
        if code := whole.wait():
            raise RuntimeError(f"a job without a fault ends with {code} ({whole.last_line()}); see {whole.log}")
    return whole, DrillJob(job, world_size, *flags)


def _run(job: DrillJob, expected: int, trainer: str = "FlameTrainer", stop_at: int = 0) -> Check:
    """Run a job, to a step before its last one if asked, with the learning rates of the whole."""
    early = [f"--training.steps={stop_at}", f"--lr_scheduler.total_steps={STEPS}"] if stop_at else []
    again = "the same command resumes, and " if job.folder.exists() else ""
    job.start(trainer, *early)
    code = job.wait()
    found = f"{code} ({job.last_line()}), see {job.log}"
    return Check(f"{again}ends with exit code {expected}", code == expected, found)


def _resume(job: DrillJob, baseline: DrillJob) -> Iterator[Check]:
    yield _run(job, 0)
    yield _same_trajectory(job, baseline)


def _same_trajectory(job: DrillJob, baseline: DrillJob) -> Check:
    """Every step is that of a run without a fault, to the last digit."""
    found, expected = trajectory(job.records()), trajectory(baseline.records())
    different = [b[0] for a, b in zip(found, expected, strict=False) if a != b]
    return Check(
        "loss, gradient norm and data of every step are those of a run without a fault",
        found == expected and bool(found),
        f"{len(found)} of {len(expected)} steps, different: {different or 'none'}",
    )


def _newest_is(job: DrillJob, step: int) -> Check:
    steps = complete_steps(job.checkpoints)
    holds = steps[-1:] == [step] and _newest_is_intact(job)
    return Check(f"the newest checkpoint, step-{step}, is intact", holds, steps)


def _newest_is_intact(job: DrillJob) -> bool:
    steps = complete_steps(job.checkpoints)
    return bool(steps) and not verify_hashes(job.checkpoints / f"step-{steps[-1]}")


def _check_status(job: DrillJob, claim: str, expected: str, *reasons: str) -> Check:
    status = job.status()
    named = all(reason in (status.get("reason") or "") for reason in reasons)
    return Check(claim, named and status.get("status") == expected, status)
