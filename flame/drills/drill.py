"""The drills: what is done to a job, and what must hold then."""

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from flame.checkpoint.commit import complete_steps, find_corruption, verify_hashes
from flame.drills.job import FAULT, INTERVAL, STALL, STEPS, Job
from flame.errors import PREEMPTED

LAST_SAVED = FAULT // INTERVAL * INTERVAL  # before the fault
RESIZED = 1e-4  # of a loss: other ranks add in another order, and Adam makes more of it step by step


class Finding(NamedTuple):
    """A claim, whether it holds, and what was found."""

    claim: str
    holds: bool
    found: object = ""


Drill = Callable[[Path, int, list[str]], Iterator[Finding]]  # (folder, ranks, flags of the job)


def kill_in_save(folder: Path, ranks: int, flags: list[str], times: int = 3) -> Iterator[Finding]:
    """kill -9 to all ranks at random moments, every other time while a checkpoint is being written"""
    flags = [f"--training.steps={20 * times}", "--checkpoint.keep_latest_k=2", *flags]
    whole, draw = _undisturbed(folder / "undisturbed", ranks, flags), random.Random(times)
    job, kills, in_save, lost = Job(folder / "killed", ranks, *flags), 0, 0, []
    while kills < times:
        job.start()
        target = max(complete_steps(job.checkpoints), default=0) + draw.randrange(1, 20)
        if not job.wait_for(lambda target=target: job.step() >= target):  # type: ignore[misc]
            break  # it has come to its end
        if kills % 2 == 0:
            job.wait_for(lambda: _is_saving(job))
        had = complete_steps(job.checkpoints)
        in_save += _is_saving(job)
        job.kill()
        kills += 1
        if had and not _newest_is_whole(job):
            lost.append(kills)
    holds = kills > 0 and not lost
    yield Finding(f"after each of {kills} kills, {in_save} in a save, the newest checkpoint is whole", holds, lost)
    yield _ends_with(job, 0)
    yield _equals(job, whole)


def sigterm(folder: Path, ranks: int, flags: list[str]) -> Iterator[Finding]:
    """SIGTERM to the launcher in the middle of training"""
    whole, job = _undisturbed(folder.parent / "undisturbed", ranks, flags), Job(folder / "stopped", ranks, *flags)
    job.start("Slow")
    job.wait_for(lambda: job.step() >= FAULT)
    assert job.process is not None
    job.process.send_signal(signal.SIGTERM)
    code, status = job.end(), job.status()
    yield Finding(f"the exit code is {PREEMPTED}", code == PREEMPTED, code)
    yield Finding("the status is preempted, by SIGTERM", _says(status, "preempted", "SIGTERM"), status)
    saved = max(complete_steps(job.checkpoints), default=0)
    yield Finding("the last step that was done is saved", saved == job.step(), f"step {saved} of {job.step()}")
    yield _ends_with(job, 0)
    yield _equals(job, whole)


def nan(folder: Path, ranks: int, flags: list[str]) -> Iterator[Finding]:
    """a gradient of one rank turns NaN"""
    whole, job = _undisturbed(folder.parent / "undisturbed", ranks, flags), Job(folder / "nan", ranks, *flags)
    yield _ends_with(job, 1, "NanGradient")
    status = job.status()
    yield Finding(
        f"the status names step {FAULT} and the parameter", _says(status, "failed", f"step {FAULT}", "weight"), status
    )
    yield _newest(job, LAST_SAVED)
    yield _ends_with(job, 0)
    yield _equals(job, whole)


def partial(folder: Path, ranks: int, flags: list[str]) -> Iterator[Finding]:
    """a byte of the newest checkpoint changes, and the one before it is cut short"""
    whole, job = _undisturbed(folder.parent / "undisturbed", ranks, flags), Job(folder / "damaged", ranks, *flags)
    yield _ends_with(job, 0, "FlameTrainer", *_up_to(3 * INTERVAL))
    newest, before = ((job.checkpoints / f"step-{n * INTERVAL}") for n in (3, 2))
    data = next(iter(sorted(newest.glob("*.distcp"))))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    cut = next(iter(sorted(before.glob("*.distcp"))))
    cut.write_bytes(cut.read_bytes()[:-100])
    yield _ends_with(job, 0)
    for path in (data, cut):
        said = f"{path.parent.name}" in job.text() and path.name in job.text()
        yield Finding(f"the damage of {path.parent.name}/{path.name} is named", said, job.log)
    yield Finding(f"it went on from step-{INTERVAL}", f"step-{INTERVAL}, step {INTERVAL}," in job.text(), job.log)
    yield _equals(job, whole)


def data_end(folder: Path, ranks: int, flags: list[str]) -> Iterator[Finding]:
    """the data end before the last step, on no rank at the same moment"""
    flags = ["--data.epochs=1", "--training.steps=100000", *flags]
    job = Job(folder / "ended", ranks, *flags)
    yield _ends_with(job, 0)
    step, status = job.step(), job.status()
    yield Finding("the status is data_exhausted", _says(status, "data_exhausted") and status["step"] == step, status)
    yield _newest(job, step)


def stall(folder: Path, ranks: int, flags: list[str]) -> Iterator[Finding]:
    """the data keep one rank waiting"""
    whole, job = _undisturbed(folder.parent / "undisturbed", ranks, flags), Job(folder / "stalled", ranks, *flags)
    yield _ends_with(job, 0, "Stall")
    waited = max((record["data/wait_seconds"] for record in job.records()), default=0)
    yield Finding(f"data/wait_seconds says so: {STALL:g} s or more", waited >= STALL, round(waited, 2))
    yield _equals(job, whole)


def resize(folder: Path, ranks: int, flags: list[str]) -> Iterator[Finding]:
    """the job goes on with another number of ranks"""
    other = ranks // 2 if ranks > 1 else 2
    whole = _undisturbed(folder.parent / "undisturbed", ranks, flags)
    job = Job(folder / "resized", ranks, *flags)
    yield _ends_with(job, 0, "FlameTrainer", *_up_to(2 * INTERVAL))
    resized = Job(folder / "resized", other, *flags)
    yield _ends_with(resized, 0)
    digests = [[record["data_digest"] for record in each.records()] for each in (whole, resized)]
    yield Finding(f"{ranks} and then {other} ranks are fed the same data at each step", digests[0] == digests[1])
    pairs = zip(whole.records(), resized.records(), strict=False)
    worst = max((abs(a["loss"] - b["loss"]) for a, b in pairs), default=float("inf"))
    yield Finding(f"every loss is that of {ranks} ranks to {RESIZED:g}", worst <= RESIZED, f"{worst:.1e}")


def disk_full(folder: Path, ranks: int, flags: list[str]) -> Iterator[Finding]:
    """one rank can no longer write a checkpoint"""
    whole, job = _undisturbed(folder.parent / "undisturbed", ranks, flags), Job(folder / "full", ranks, *flags)
    yield _ends_with(job, 1, "DiskFull")
    status = job.status()
    yield Finding("the status says what could not be saved", _says(status, "failed", "could not be saved"), status)
    yield _newest(job, LAST_SAVED)
    yield _ends_with(job, 0)
    yield _equals(job, whole)


DRILLS: dict[str, Drill] = {
    drill.__name__: drill for drill in (kill_in_save, sigterm, nan, partial, data_end, stall, resize, disk_full)
}


def _undisturbed(folder: Path, ranks: int, flags: list[str]) -> Job:
    """A run that nothing is done to; drills share one."""
    job = Job(folder, ranks, *flags)
    code = 0 if _says(job.status(), "completed") else job.run()
    if code != 0:
        raise RuntimeError(f"a job that nothing is done to ends with {code} ({job.said()}); see {job.log}")
    return job


def _up_to(step: int) -> list[str]:
    """Flags of a job that ends early, with the learning rates of the whole."""
    return [f"--training.steps={step}", f"--lr_scheduler.total_steps={STEPS}"]


def _ends_with(job: Job, wanted: int, fault: str = "FlameTrainer", *flags: str) -> Finding:
    again = "the same command goes on, and " if job.folder.exists() else ""
    code = job.run(fault, *flags)
    return Finding(f"{again}ends with exit code {wanted}", code == wanted, f"{code} ({job.said()}), see {job.log}")


def _equals(job: Job, whole: Job) -> Finding:
    """Every step is that of a run nothing was done to, to the last digit."""
    course, expected = job.course(), whole.course()
    different = [b[0] for a, b in zip(course, expected, strict=False) if a != b]
    holds = course == expected and bool(course)
    found = f"{len(course)} of {len(expected)} steps, different: {different or 'none'}"
    return Finding("loss, gradient norm and data of every step are those of an undisturbed run", holds, found)


def _newest(job: Job, step: int) -> Finding:
    steps = complete_steps(job.checkpoints)
    holds = steps[-1:] == [step] and _newest_is_whole(job)
    return Finding(f"the newest checkpoint, step-{step}, is whole", holds, steps)


def _newest_is_whole(job: Job) -> bool:
    steps = complete_steps(job.checkpoints)
    return bool(steps) and not verify_hashes(job.checkpoints / f"step-{steps[-1]}")


def _is_saving(job: Job) -> bool:
    return any(find_corruption(path) is not None for path in job.checkpoints.glob("step-*"))


def _says(status: dict, name: str, *reasons: str) -> bool:
    return status.get("status") == name and all(reason in (status.get("reason") or "") for reason in reasons)
