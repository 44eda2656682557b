"""torchrun, but with one line on why a job failed, and patient with ranks that were asked to stop.

torchrun kills its ranks 30 s after it gets a signal. Here it gets none: this process passes them on to the ranks.
"""

import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from itertools import dropwhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from flame.config.without_torch import without_torch
from flame.errors import EXHAUSTED, FAILED, PREEMPTED, REFUSED, UserError
from flame.runtime.stop import LAUNCHED, SIGNALS, Signals, leave

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    from flame.runtime.output import RankOutput

# {exit code of a rank that has printed why it ends: exit code of the launcher}
EXIT_CODES = {REFUSED: REFUSED, FAILED: 1, EXHAUSTED: 1, PREEMPTED: PREEMPTED}
EXIT_CODES |= {128 + number: 128 + number for number in SIGNALS}
GRACE = 3.0  # seconds that the ranks have to end after a second signal


class LocalRanks:
    """The ranks of this node, and the signals that are passed on to them."""

    def __init__(self) -> None:
        self.signals = Signals(self._pass_on, self._end)
        self.ended_by = 0  # the number of the second signal
        self.errors = ""  # a folder that must not outlive this process
        self._context: SubprocessContext | None = None

    def start(self, context: "SubprocessContext") -> None:
        """Start the ranks in torchrun's place; signals that arrive before a rank listens are kept for it."""
        from torch.distributed.elastic.multiprocessing.api import PContext

        self._context = context
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a child inherits this, and flame.train undoes it
        PContext.start(context)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if self.signals.asked:  # in the meantime
            self._pass_on(self.signals.asked)

    def _pass_on(self, number: int) -> None:
        if self._context is None:
            shutil.rmtree(self.errors, ignore_errors=True)
            leave(number)
        for rank in self._context.subprocess_handlers.values():
            rank.proc.send_signal(number)

    def _end(self, number: int) -> None:
        self.ended_by = number
        self._pass_on(number)
        threading.Thread(target=self._kill, daemon=True).start()

    def _kill(self) -> None:
        time.sleep(GRACE)
        assert self._context is not None
        for rank in self._context.subprocess_handlers.values():
            if rank.proc.poll() is None:
                os.killpg(rank.proc.pid, signal.SIGKILL)  # with the processes it started, as torchrun does
        time.sleep(GRACE)
        shutil.rmtree(self.errors, ignore_errors=True)
        os._exit(128 + self.ended_by)  # torchrun would wait for other nodes


def check_port() -> None:
    """Raises UserError if this node, the only one, cannot listen at MASTER_PORT."""
    port = os.environ.get("MASTER_PORT")
    if port and os.environ.get("NNODE", "1") == "1":
        try:
            socket.create_server(("", int(port))).close()
        except (OSError, ValueError, OverflowError) as error:  # the last two: not a number, not that of a port
            raise UserError("MASTER_PORT", port, "a free port", getattr(error, "strerror", "") or "") from None


def launch(argv: list[str]) -> int:
    """Run torchrun with `argv`; returns the exit code, that of the rank that ended first if it has reported why."""
    os.environ[LAUNCHED] = str(time.monotonic())
    ranks = LocalRanks()
    ranks.signals.listen()
    with without_torch():
        from flame.config.parser import parse
    logging.getLogger("flame").setLevel(logging.ERROR)  # the ranks log what they ignore
    from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    from flame.runtime.failure import version_of_status
    from flame.runtime.output import RankOutput

    for name in ("multiprocessing", "multiprocessing.errors"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    SubprocessContext.start = lambda context: ranks.start(context)  # type: ignore
    args = parse_args(["--signals_to_handle", "SIGHUP,SIGQUIT", "--log-dir", os.devnull, *argv])
    flags = list(dropwhile(lambda word: not word.startswith("--"), args.training_script_args))
    try:
        run = Path(parse(flags).job.dump_folder)
    except UserError as error:
        _print(str(error))
        return REFUSED
    config, program, words = config_from_args(args)
    shown = {int(rank) for rank in args.local_ranks_filter.split(",")} if args.local_ranks_filter else None
    if config.max_nodes > 1:
        _print(f"waiting for {config.max_nodes} nodes at {args.rdzv_endpoint}")
    before = version_of_status(run)
    with TemporaryDirectory(prefix="flame-") as ranks.errors:
        config.logs_specs = output = RankOutput(run, shown, ranks.errors)
        try:
            elastic_launch(config=config, entrypoint=program)(*words)
            return 0
        except ChildFailedError as error:
            failures = error.failures
        except SignalException as signalled:
            return 128 + signalled.sigval
        except RendezvousError as error:
            _print(str(_explain(error, args.rdzv_endpoint, config.max_nodes)))
            return 1
        finally:
            output.finish()
        return 128 + ranks.ended_by if ranks.ended_by else _report(failures, run, output, before)


def _print(line: str) -> None:
    print(f"flame: {line}", file=sys.stderr, flush=True)


def _explain(error: "RendezvousError", endpoint: str, nodes: int) -> UserError:
    """Why the nodes did not find each other."""
    from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousTimeoutError

    if isinstance(error, RendezvousTimeoutError | RendezvousClosedError):
        return UserError("NNODE", nodes, hint=f"not all of {nodes} nodes came to {endpoint}")
    found = f"{endpoint}, where no first node answers"
    return UserError("MASTER_ADDR, MASTER_PORT", found, hint=str(error.__cause__ or error))


def _report(
    failures: "Mapping[int, ProcessFailure]", run: Path, output: "RankOutput", before: tuple[int, int] | None
) -> int:
    """The exit code after ranks failed. Prints why, unless a rank that is shown has done so.

    before: the version of the run's status when this start began.
    """
    from flame.runtime.failure import describe, find_cause, has_begun, read_error, record
    from flame.runtime.output import show

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
