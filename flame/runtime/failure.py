"""Why the ranks of a node ended, in one line, when one of them has not said it itself."""

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flame.errors import UserError
from flame.runtime.lock import check_free
from flame.runtime.run_folder import Run

KILLS = {-number for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)}  # negative, as exit codes


@dataclass(frozen=True)
class Failure:
    """How a rank ended: exit code, negative for a signal; the file of its exception, if there is one; when, in s."""

    exitcode: int
    error_file: str
    timestamp: float


def find_cause(failures: Mapping[int, Failure]) -> tuple[int, Failure]:
    """The rank, and its failure, that the other ranks of the node failed after; `failures` in the order of their ends.

    A rank notices the end of another only when that one's sockets are closed. Two may have ended before the launcher
    looked: a kill is then the cause of an exception, and an exception that of a later one.
    """
    (_, first), *_ = found = list(failures.items())
    if kills := [(r, f) for r, f in found if f.exitcode in KILLS and f.timestamp <= first.timestamp + 1]:
        return kills[0]
    raised = [(rank, failure) for rank, failure in found if os.path.isfile(failure.error_file)]
    if os.path.isfile(first.error_file):
        return min(raised, key=lambda item: os.stat(item[1].error_file).st_mtime_ns)
    return found[0]


def read_error(failure: Failure) -> tuple[str, str]:
    """The first line of a rank's exception, and its traceback; ("", "") if it did not end by one."""
    try:
        message = json.loads(Path(failure.error_file).read_text())["message"]
        return message["message"].partition("\n")[0], message["extraInfo"]["py_callstack"]
    except (OSError, ValueError):
        return "", ""


def describe(rank: int, failure: Failure) -> str:
    """How a rank ended: "rank 1: RuntimeError: ...", "rank 1 was killed by signal 9 (SIGKILL)"."""
    if error := read_error(failure)[0]:
        return f"rank {rank}: {error}"
    if failure.exitcode >= 0:
        return f"rank {rank} ended with exit code {failure.exitcode}"
    hint = ", as the kernel does when memory runs out" if failure.exitcode == -signal.SIGKILL else ""
    return f"rank {rank} was killed by signal {-failure.exitcode} ({_name_signal(-failure.exitcode)}){hint}"


def _name_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time one
        return "<N/A>"


def version_of_status(folder: Path) -> tuple[int, int] | None:
    """What differs after each write of a run's status; None if there is none."""
    try:
        found = (folder / "status.json").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def has_begun(folder: Path, before: tuple[int, int] | None, is_first: bool) -> bool:
    """Whether a start whose ranks have ended began its run: a rejected one writes no status.

    before: the version of the status at the start. is_first: whether rank 0 was on this node; if the folder is held
    after its end, the status is another run's.
    """
    try:
        if is_first:
            check_free(folder)
    except UserError:
        return False
    return version_of_status(folder) not in (None, before)


def record(folder: Path, reason: str, by: int) -> None:
    """Set the status of a run to "failed": rank 0 cannot if it was killed, and does not know why another one failed."""
    run = Run(folder, writes=True)
    try:
        check_free(folder)
    except UserError:  # the status is another run's
        return
    if run.read_status().get("status") in ("running", "failed" if by else None):
        run.set_status("failed", reason=reason)
