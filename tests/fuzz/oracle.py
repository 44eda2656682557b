"""The one rule of the fuzz tests, and the processes that cases run in.

A case succeeds, or is rejected with one line. All else is a fault: another exit code, a traceback, a process that dies,
too much time or memory, and any file that appears, changes or goes outside out/. Code that an input brings along makes
such a file.
"""

import faulthandler
import hashlib
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from flame.runtime import device

CPU_SECONDS = 20  # not of the clock: other processes may have the cores
ASLEEP_SECONDS = 20  # of the clock, in which no CPU time is used: also where many run, each gets some
MEMORY = 6 * 2**30
OUT = "out"  # what a command may write
# begin lines that may come with a rejection: bad rows, tensors that are missing, unknown fields
MORE = ("source ", "  ", "model.json: neither ")
TRACEBACK = "Traceback (most recent call last)"

device.choose()  # in the process that forks; conftest.py has in this one
fork = get_context("forkserver")  # children of a process that has imported everything, and started no threads
AREAS = sorted(f"tests.fuzz.{path.stem}" for path in Path(__file__).parent.glob("test_*.py"))
fork.set_forkserver_preload([__name__, *AREAS])


class Area(NamedTuple):
    """write(case) makes the input in the working directory, run(case) returns the exit code of the commands on it.

    rejections: the exit codes that come with one line. shared: how many cases run in one process.
    """

    name: str
    cases: SearchStrategy
    write: Callable[[Any], None]
    run: Callable[[Any], int]
    rejections: tuple[int, ...] = (2,)
    shared: int = 200


def check(area: Area, count: int, folder: Path, capsys: Any) -> None:
    """Run so many cases, the same each time, and print the counts. Fails with the shortest case of each fault."""
    results: Counter[str] = Counter()
    seconds: list[float] = []
    faults: dict[str, tuple[str, str]] = {}  # {place: (case, what was seen)}
    worker = _Worker(area, folder)

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(area.cases)
    def each(case: Any) -> None:
        result, seen, spent = worker.try_case(case)
        seconds.append(spent)
        results[result if result in ("succeeded", "rejected") else "failed"] += 1
        if result not in ("succeeded", "rejected"):
            faults[result] = min(faults.get(result, (repr(case), seen)), (repr(case), seen), key=lambda f: len(f[0]))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Generating overly large repr")  # of many values to choose from
        each()
    worker.stop()
    counts = ", ".join(f"{results[result]:,} {result}" for result in ("succeeded", "rejected", "failed"))
    with capsys.disabled():
        time = f"{sum(seconds):,.0f} s of CPU time, at most {max(seconds):.1f} s"
        print(f"\n{area.name}: {len(seconds):,} cases, {counts}, {len(faults)} faults; {time}", flush=True)
    if faults:
        pytest.fail("\n\n".join(f"{place}\n{case}\n{seen}" for place, (case, seen) in faults.items()), pytrace=False)


class _Worker:
    """A process that runs cases one after the other; another follows one that died, hung or is worn out."""

    def __init__(self, area: Area, folder: Path) -> None:
        self.area, self.folder = area, folder
        self.process: Any = None

    def try_case(self, case: Any) -> tuple[str, str, float]:
        """ "succeeded", "rejected" or where a fault is; what was printed; seconds of CPU time."""
        if self.process is None:
            self.connection, theirs = fork.Pipe()
            self.process = fork.Process(target=_serve, args=(theirs, self.area[2:], self.folder), daemon=True)
            self.process.start()
            theirs.close()
            self.left = self.area.shared
        self.connection.send(case)
        self.left -= 1
        try:
            if self._await_result():
                result = self.connection.recv()
                if not self.left:
                    self.stop()
                return result
            os.kill(self.process.pid, signal.SIGPROF)  # prints where it is, and ends it
            died = "asleep"
        except (EOFError, ConnectionResetError):
            died = ""
        self.process.join(10)
        died = died or _describe_exit(self.process.exitcode)
        self.stop()
        printed = _printed(self.folder)
        return f"{died}, {_place(printed)}", printed[-2000:], 0

    def _await_result(self) -> bool:
        """False if the process fell asleep."""
        spent, since = "", time.monotonic()
        while not self.connection.poll(1):
            now = " ".join(Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13])
            if now != spent:
                spent, since = now, time.monotonic()
            elif time.monotonic() - since > ASLEEP_SECONDS:
                return False
        return True

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
        self.process = None


def _describe_exit(code: int | None) -> str:
    if code == -signal.SIGPROF:
        return f"more than {CPU_SECONDS} s of CPU time"
    return signal.Signals(-code).name if code is not None and code < 0 else f"process ended with {code}"


def _printed(folder: Path) -> str:
    return "".join((folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))


def _serve(connection: Any, functions: tuple[Any, ...], folder: Path) -> None:
    """What a worker does: cases come, results go, until the other end closes."""
    write, run, rejections, _ = functions
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND), descriptor)
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, all_threads=False, chain=True)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        shutil.rmtree(folder / "case", ignore_errors=True)
        shutil.rmtree(Path(os.environ["HF_HOME"], "datasets"), ignore_errors=True)
        (folder / "case" / OUT).mkdir(parents=True)
        os.chdir(folder / "case")
        write(case)
        before = snapshot(".", OUT)
        for descriptor in (1, 2):
            os.ftruncate(descriptor, 0)
        begin = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        code = _exit_code(run, case)
        signal.setitimer(signal.ITIMER_PROF, 0)
        spent = time.process_time() - begin
        after = snapshot(".", OUT)
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        connection.send((*_judge(code, rejections, changed, folder), spent))


def _exit_code(run: Callable[[Any], int], case: Any) -> int:
    try:
        return run(case)
    except SystemExit as ended:  # argparse
        return ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # also what Rust panics with
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def snapshot(root: str, *without: str) -> dict[str, Any]:
    """{path: content} of all below a folder, without some of what is in it."""
    found: dict[str, Any] = {}
    for parent, folders, files in os.walk(root):
        if parent == root:
            folders[:] = [name for name in folders if name not in without]
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink():
                found[str(path)] = os.readlink(path)
            elif path.is_file():
                found[str(path)] = hashlib.blake2b(path.read_bytes()).hexdigest()
            else:
                found[str(path)] = path.stat().st_mode
    return found


def _judge(code: int, rejections: tuple[int, ...], changed: list[str], folder: Path) -> tuple[str, str]:
    """As `try_case` returns it, without the time."""
    printed, stderr = _printed(folder), (folder / "stderr").read_text(errors="replace")
    lines = [line for line in stderr.splitlines() if not line.startswith(MORE)]
    if changed:
        return f"changed {', '.join(changed[:3])}", printed[-2000:]
    if TRACEBACK in printed:
        return f"{_last_line(printed)}, {_place(printed)}", printed[-2000:]
    if code == 0:
        return "succeeded", ""
    if code in rejections and len(lines) == 1 and ": " in lines[0]:
        return "rejected", ""
    return f"exit code {code}, {len(lines)} lines", printed[-2000:]


def _last_line(printed: str) -> str:
    """The type of the last exception."""
    names = re.findall(
        r"^(?:\[rank0\]:)?([\w.]+(?:Error|Exception|Interrupt|Iteration|Panic\w*|Warning)\b)", printed, re.M
    )
    return names[-1].rpartition(".")[2] if names else "a traceback"


def _place(printed: str) -> str:
    """The innermost line of flame in the last stack that was printed."""
    first = printed.rfind(TRACEBACK)
    places = re.findall(r'File "[^"]*?((?:flame|scripts|tests/fuzz)/[^"]*)", line (\d+)', printed[max(first, 0) :])
    if not places:
        return "outside flame"
    return ":".join(places[-1] if first >= 0 else places[0])
