"""Requests to stop: a signal to the launcher or to a rank, or the end of the wall time. Imports no torch."""

import os
import re
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from flame.errors import PREEMPTED, UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
WINDOW = 5.0  # seconds in which any number of signals is one request
OUT_OF_TIME = 1000  # stands for a signal's number; larger than any of them
LAUNCHED = "FLAME_LAUNCHED"  # environment variable: time.monotonic() at launch, a clock that all processes here share

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}  # in the order in which a duration has them


class Stopped(BaseException):
    """A run ends before its last step because it was asked to; not an error, so not an Exception."""

    def __init__(self, number: int) -> None:
        super().__init__("max_wall_time" if number == OUT_OF_TIME else signal.Signals(number).name)


class Signals:
    """Calls `first` at the first signal, and `again` at one that comes more than WINDOW later.

    Signals in between are the same request: Slurm may signal the launcher and every rank, the launcher passes its own
    on, and torchrun signals the other ranks when one ends.
    """

    def __init__(self, first: Callable[[int], None], again: Callable[[int], None]) -> None:
        self.first, self.again = first, again
        self.asked = 0  # the number of the first signal
        self._since = 0.0

    def listen(self) -> None:
        """Handle signals from now on, and those that flame.runtime.launch blocked until now."""
        for number in SIGNALS:
            signal.signal(number, self._receive)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._since = number, now
            self.first(number)
        elif now - self._since > WINDOW:
            self.again(number)


def leave(number: int) -> NoReturn:
    """End this process, which has nothing to lose yet; not by an exception, as any import may be under way."""
    _print(f"stopped by {signal.Signals(number).name} before training began; the same command starts it again")
    os._exit(PREEMPTED)


def note(number: int) -> None:
    """Do nothing now: all ranks ask for the number at the end of the step."""


def interrupt(number: int) -> NoReturn:
    """Raise Stopped wherever this process is."""
    raise Stopped(number)


def end_at_once(number: int) -> NoReturn:
    """End this process as the signal itself would have."""
    _print(f"a second signal, {signal.Signals(number).name}: stopped at once, what was not saved is lost")
    os._exit(128 + number)


def ignore() -> None:
    """Ignore all signals from now on."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def seconds(duration: str | int) -> int:
    """Seconds of a duration such as 3h30m, 45s or 2d, or of a number of seconds.

    Raises UserError, which names --training.max_wall_time, for any other text, for 0 and for more than 9 digits.
    """
    text = str(duration)
    pattern = "".join(rf"(?:(\d{{1,9}}){unit})?" for unit in _UNITS)
    parts = re.fullmatch(pattern, f"{text}s" if text.isdecimal() else text)
    counts = [int(count or 0) for count in parts.groups()] if parts else []
    total = sum(count * unit for count, unit in zip(counts, _UNITS.values(), strict=False))
    if total == 0:
        allowed = "a time such as 3h30m, 90m, 2d or a number of seconds, above 0 and of at most 9 digits"
        raise UserError("--training.max_wall_time", repr(duration), allowed)
    return total


def launched_at() -> float:
    """time.monotonic() when this job was launched; now, if no launcher started this process."""
    return float(os.environ.get(LAUNCHED) or time.monotonic())


def _print(line: str) -> None:
    os.write(2, f"flame: {line}\n".encode())  # in a signal handler: the streams may be in the middle of a write
