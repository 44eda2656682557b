"""What a part of the GPU check works with: processes that end with its time, and a list of what it found."""

import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Skip(Exception):
    """The part cannot be done here; the message says why."""


class OutOfTime(Exception):
    """The part has used its time."""


class PartError(Exception):
    """A process of the part failed; the message is its last line and its log."""


class Bench:
    """Handed to each part in turn.

    out: results, logs and what parts share. work: a folder for the part's runs, removed at its end. environment,
    stub: of processes, and what those on the rehearsal's GPU have beside it. lock: a file that they keep open.
    checks, numbers: of the part. results: {part: its last result}.
    """

    def __init__(
        self, out: Path, environment: dict[str, str], stub: dict[str, str], machine: dict[str, Any], lock: int
    ) -> None:
        self.out, self.machine, self.work = out, machine, out / "work"
        self.results: dict[str, Any] = {}
        self.running: set[subprocess.Popen] = set()
        self._environment, self._stub, self._lock = environment, stub, lock

    @property
    def tiny(self) -> bool:
        return self.machine["tiny"]

    @property
    def on_gpu(self) -> bool:
        return self.machine["device"] is not None

    @property
    def rehearsal(self) -> bool:
        return self.machine["rehearsal"]

    def begin(self, part: str, limit: float) -> None:
        self.part, self.end = part, time.monotonic() + limit
        self.checks: list[dict[str, Any]] = []
        self.numbers: dict[str, Any] = {}
        shutil.rmtree(self.work, ignore_errors=True)  # of a start that was killed
        self.work.mkdir()

    def check(self, name: str, figure: str, ok: bool | None, about: str = "values") -> None:
        """Note a finding; ok None: a figure without a bound.

        about: "values" that a GPU computes, the "speed" of whole models on one, or how a "run" went, which holds
        on the rehearsal's GPU as well.
        """
        whole = self.on_gpu and not self.tiny
        counts = {"run": True, "values": not self.rehearsal, "speed": whole and not self.rehearsal}[about]
        ok = ok if counts else None
        self.checks.append({"name": name, "figure": figure, "ok": ok})
        print(f"  {mark(ok)}  {name}: {figure}", flush=True)

    # -- processes -----------------------------------------------------------------------------------------------------
    def start(self, *command: str, cpu: bool = False) -> subprocess.Popen:
        """Start a process, "python" being that of the check, with a log of its own. cpu: it sees no GPU."""
        logs = self.out / "logs"
        logs.mkdir(exist_ok=True)
        path = logs / f"{self.part}-{sum(1 for _ in logs.glob(f'{self.part}-*.log')) + 1}.log"
        given = {"NGPU": "1", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
        given |= {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}  # as train.sh does
        given |= {"CUDA_VISIBLE_DEVICES": ""} if cpu else self._stub
        program = self._environment["FLAME_PYTHON"] if command[0] == "python" else command[0]
        with path.open("w") as log:
            process = subprocess.Popen(
                [program, *command[1:]], cwd=ROOT, env=self._environment | given, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True, pass_fds=[self._lock],
            )  # fmt: skip
        process.log = path  # type: ignore[attr-defined]
        self.running.add(process)
        return process

    def wait(self, process: subprocess.Popen) -> None:
        """Wait for a process to succeed, within the part's time. Raises OutOfTime, PartError."""
        try:
            code = process.wait(max(0.1, self.end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise OutOfTime from None
        self.running.discard(process)
        if code:
            path: Path = process.log  # type: ignore[attr-defined]
            lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
            raise PartError(f"exit code {code}: {lines[-1] if lines else 'no output'} ({path})")

    def train(self, folder: Path, *flags: str, cpu: bool = False) -> subprocess.Popen:
        """Start a job: on a CPU with train.sh, on a GPU with its launcher and a rank that tunes no kernel (rank.py)."""
        job = [f"--job.dump_folder={folder}", *flags]
        if cpu or not self.on_gpu:
            return self.start("bash", "train.sh", *job, cpu=True)
        return self.start("python", "-m", "flame.runtime.launch", "-m", "scripts.gpu_check.rank", *job)

    def ask(self, module: str, spec: dict[str, Any]) -> list[dict[str, Any]]:
        """Run a module of this folder on a spec; what it wrote, line by line, even if it ran out of time.

        Raises PartError; call `check_time` when what was written has been judged.
        """
        path = self.work / f"{module}.jsonl"
        path.unlink(missing_ok=True)
        with suppress(OutOfTime):
            self.wait(
                self.start("python", "-m", f"scripts.gpu_check.{module}", json.dumps({**spec, "result": str(path)}))
            )
        return records(path)

    def small_model(self, name: str) -> Path:
        """A Hugging Face folder with the first weights of a model: shrunk, or the debug job's; made once."""
        folder = self.out / "models" / name
        if not folder.exists():
            self.wait(self.start("python", "-m", "scripts.gpu_check.models", name, str(folder), cpu=True))
        return folder

    def check_time(self) -> None:
        """Raises OutOfTime if the part's time is over."""
        if time.monotonic() >= self.end:
            raise OutOfTime


def mark(ok: bool | None) -> str:
    """How a finding is shown."""
    return {True: "ok  ", False: "FAIL", None: "    "}[ok]


def records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, without a last one that is still being written; [] if there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def percent(value: float) -> str:
    return f"{100 * value:.3g} %" if math.isfinite(value) else "not a number"


def kill_all(processes: set[subprocess.Popen]) -> None:
    """SIGKILL to processes and all that they have started, and wait for the former."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            children[int(stat.read_text().rpartition(")")[2].split()[1])].append(int(stat.parent.name))

    def tree(pid: int) -> Iterable[int]:
        yield pid
        for child in children[pid]:
            yield from tree(child)

    for process in processes:
        for pid in list(tree(process.pid)) if process.poll() is None else []:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    processes.clear()
