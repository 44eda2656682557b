"""Starts the ranks of this node and waits for them; prints one line on why a job failed.

`python -m flame.runtime.launch -m MODULE ...` starts one rank. What begins with another flag is torchrun's command
line: torchrun starts the ranks. It kills them 30 s after it gets a signal; this process passes signals on instead.
"""

import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from itertools import dropwhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from flame.config.without_torch import without_torch
from flame.errors import EXHAUSTED, FAILED, PREEMPTED, REFUSED, UserError
from flame.runtime.failure import Failure, describe, find_cause, has_begun, read_error, record, version_of_status
from flame.runtime.output import RankOutput, report, show
from flame.runtime.ranks import LocalRanks, OneRank
from flame.runtime.stop import LAUNCHED, SIGNALS

if TYPE_CHECKING:
    from flame.runtime.torchrun import Torchrun

# {exit code of a rank that has printed why it ends: exit code of the launcher}
EXIT_CODES = {REFUSED: REFUSED, FAILED: 1, EXHAUSTED: 1, PREEMPTED: PREEMPTED}
EXIT_CODES |= {128 + number: 128 + number for number in SIGNALS}


def check_port() -> None:
    """Raises UserError if this node, the only one, cannot listen at MASTER_PORT."""
    port = os.environ.get("MASTER_PORT")
    if port and os.environ.get("NNODE", "1") == "1":
        try:
            socket.create_server(("", int(port))).close()
        except (OSError, ValueError, OverflowError) as error:  # the last two: not a number, not that of a port
            raise UserError("MASTER_PORT", port, "a free port", getattr(error, "strerror", "") or "") from None


def launch(argv: list[str]) -> int:
    """Start the ranks of a command line; returns the exit code, that of the rank that ended first if it said why."""
    os.environ[LAUNCHED] = str(time.monotonic())
    ranks = LocalRanks()
    ranks.signals.listen()
    with without_torch():
        from flame.config.parser import parse
    logging.getLogger("flame").setLevel(logging.ERROR)  # the ranks log what they ignore
    job = _read(argv)
    flags = list(dropwhile(lambda word: not word.startswith("--"), job.words))
    try:
        run = Path(parse(flags).job.dump_folder)
    except UserError as error:
        report(str(error))
        return REFUSED
    before = version_of_status(run)
    with TemporaryDirectory(prefix="flame-") as ranks.errors:
        output = RankOutput(run, job.shown, ranks.errors)
        try:
            failures = job.run(ranks, output)
        finally:
            output.finish()
        if not failures:
            return 0
        return 128 + ranks.ended_by if ranks.ended_by else _report(failures, run, output, before)


def _read(argv: list[str]) -> "OneRank | Torchrun":
    if argv[:1] == ["-m"]:
        return OneRank(argv)
    from flame.runtime.torchrun import Torchrun

    return Torchrun(argv)


def _report(failures: Mapping[int, Failure], run: Path, output: RankOutput, before: tuple[int, int] | None) -> int:
    """The exit code after ranks failed. Prints why, unless a rank that is shown has done so.

    before: the version of the run's status when this start began.
    """
    rank, cause = find_cause(failures)
    if cause.exitcode in EXIT_CODES:
        said = output.logs[rank].said
        shown = {log.said for log in output.logs.values() if log.is_shown}
        if said and said not in shown:
            show(2, output.logs[rank].prefix + said + b"\n")
        if has_begun(run, before, is_first=0 in output.logs):
            if 0 in output.logs and cause.exitcode != PREEMPTED:
                why = said.decode(errors="backslashreplace").removeprefix("flame: ")
                by = 0 if output.logs[0].said else rank  # what rank 0 says is in the status too
                record(run, f"rank {rank}: {why}" if why else describe(rank, cause), by)
        elif cause.exitcode == REFUSED:
            for log in output.logs.values():
                log.discard()
        return EXIT_CODES[cause.exitcode]
    for failed, failure in failures.items():
        output.logs[failed].write(read_error(failure)[1].encode(errors="backslashreplace"))
    reason, log = describe(rank, cause), output.logs[rank]
    if 0 in output.logs:
        record(run, reason, by=rank)
    kept = [f"{name} {path}" for name, path in (("status", run / "status.json"), ("log", log.path)) if path.exists()]
    line = f"flame: {'; '.join(filter(None, (reason, ', '.join(kept))))}\n"
    log.write(line.encode(errors="backslashreplace"))
    show(2, (read_error(cause)[1] + line).encode(errors="backslashreplace"))
    return 1


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
