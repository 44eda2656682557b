"""torchrun, but silent about what a rank has reported itself, and patient with ranks that were asked to stop.

torchrun kills its ranks 30 s after it gets a signal. Here it gets none: this process passes them on to the ranks.
"""

import logging
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

from flame.errors import EXHAUSTED, FAILED, PREEMPTED, REFUSED
from flame.runtime.stop import LAUNCHED, SIGNALS, Signals, leave

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

# {exit code of a rank that has printed why it ends: exit code of the launcher}
EXIT_CODES = {REFUSED: REFUSED, FAILED: 1, EXHAUSTED: 1, PREEMPTED: PREEMPTED}
EXIT_CODES |= {128 + number: 128 + number for number in SIGNALS}
GRACE = 3.0  # seconds that the ranks have to end after a second signal


class LocalRanks:
    """The ranks of this node, and the signals that are passed on to them."""

    def __init__(self) -> None:
        self.signals = Signals(self._pass_on, self._end)
        self.ended_by = 0  # the number of the second signal
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
        os._exit(128 + self.ended_by)  # torchrun would wait for other nodes


def launch(argv: list[str]) -> int:
    """Run torchrun with `argv`; returns the exit code, that of the rank that ended first if it has reported why."""
    os.environ[LAUNCHED] = str(time.monotonic())
    ranks = LocalRanks()
    ranks.signals.listen()

    from torch.distributed.elastic.multiprocessing.api import SubprocessContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    for name in ("multiprocessing", "multiprocessing.errors"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    SubprocessContext.start = lambda context: ranks.start(context)  # type: ignore
    try:
        main(["--signals_to_handle", "SIGHUP,SIGQUIT", *argv])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if ranks.ended_by:
            return 128 + ranks.ended_by
        if failure.exitcode in EXIT_CODES:
            return EXIT_CODES[failure.exitcode]
        raise
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
