"""The ranks of this node: passes signals on to them, and starts one that has no others. Imports no torch."""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from subprocess import Popen
from types import FrameType
from typing import NoReturn

from flame.runtime.failure import Failure
from flame.runtime.output import RankOutput
from flame.runtime.stop import SIGNALS, Signals, leave

GRACE = 3.0  # seconds that the ranks have to end after a second signal
FATAL = (signal.SIGHUP, signal.SIGQUIT)  # end the job without a last checkpoint


class LocalRanks:
    """The ranks of this node, and the signals that are passed on to them."""

    def __init__(self) -> None:
        self.signals = Signals(self._pass_on, self._end)
        self.ended_by = 0  # the number of the second signal
        self.errors = ""  # a folder that must not outlive this process
        self._processes: list[Popen] | None = None

    def start(self, start: Callable[[], Iterable[Popen]]) -> None:
        """Start the ranks; signals that arrive before a rank listens are kept for it."""
        self._processes = []
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a child inherits this, and flame.train undoes it
        self._processes = list(start())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if self.signals.asked:  # in the meantime
            self._pass_on(self.signals.asked)

    def _pass_on(self, number: int) -> None:
        if self._processes is None:
            shutil.rmtree(self.errors, ignore_errors=True)
            leave(number)
        for process in self._processes:
            process.send_signal(number)

    def _end(self, number: int) -> None:
        self.ended_by = number
        self._pass_on(number)
        threading.Thread(target=self._kill, daemon=True).start()

    def _kill(self) -> None:
        time.sleep(GRACE)
        for process in self._processes or ():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes it started, as torchrun does
        time.sleep(GRACE)
        shutil.rmtree(self.errors, ignore_errors=True)
        os._exit(128 + self.ended_by)  # torchrun would wait for other nodes


class OneRank:
    """A job of one rank, which needs no rendezvous.

    command: what follows `python`, beginning with -m and a module. words: the arguments of that module.
    """

    shown = None

    def __init__(self, command: list[str]) -> None:
        self._command, self.words = command, command[2:]

    def run(self, ranks: LocalRanks, output: RankOutput) -> dict[int, Failure]:
        """Start the rank and wait for its end; {} or how it failed. Raises SystemExit after a fatal signal."""
        stdout, stderr = output.open(0, 0, 1)
        environment = {
            **os.environ,
            **dict.fromkeys(("RANK", "LOCAL_RANK"), "0"),
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1"),
            **{"MASTER_ADDR": "localhost", "MASTER_PORT": "0"},  # any free one: nobody else connects
            "TORCHELASTIC_ERROR_FILE": output.error_file(0),
        }
        started: list[Popen] = []

        def end(number: int, _frame: FrameType | None) -> NoReturn:
            for process in started:
                os.killpg(process.pid, number)
            sys.exit(128 + number)

        def start() -> list[Popen]:
            command = [sys.executable, "-u", *self._command]
            started.append(Popen(command, env=environment, stdout=stdout, stderr=stderr, start_new_session=True))
            return started

        for number in FATAL:
            signal.signal(number, end)
        ranks.start(start)
        exitcode = started[0].wait()
        return {0: Failure(exitcode, output.error_file(0), time.time())} if exitcode else {}
