"""Being asked to stop: by a signal, to the launcher or to a rank, or by the time a run may take. Imports no torch."""

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
OUT_OF_TIME = 1000  # where a signal's number is expected; larger than any of them
LAUNCHED = "FLAME_LAUNCHED"  # environment variable: time.monotonic(), which processes of one machine share, at launch

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile("".join(rf"(?:(\d+){unit})?" for unit in _UNITS))


class Stopped(BaseException):
    """A run ends before its last step because it was asked to: no error, so not an Exception."""

    def __init__(self, number: int) -> None:
        super().__init__("max_wall_time" if number == OUT_OF_TIME else signal.Signals(number).name)


class Signals:
    """What this process does about signals: `first` at the first one, `again` at one more than WINDOW after it.

    Slurm may signal the launcher and every rank, and the launcher passes its own on; torchrun signals the ranks that
    are left when one ends. All of that is one request.
    """

    def __init__(self, first: Callable[[int], None], again: Callable[[int], None]) -> None:
        self.first, self.again = first, again
        self.asked = 0  # the number of the first signal
        self._since = 0.0

    def listen(self) -> None:
        """Take the signals from now on, and those that were held back before (see flame.runtime.launch)."""
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
    """End this process, which has nothing to lose yet. Not by an exception: any import may be under way."""
    _say(f"stopped by {signal.Signals(number).name} before training began; the same command starts it again")
    os._exit(PREEMPTED)


def note(number: int) -> None:
    """Go on to where all ranks ask what was noted."""


def interrupt(number: int) -> NoReturn:
    """Raise Stopped wherever this process is."""
    raise Stopped(number)


def end_at_once(number: int) -> NoReturn:
    """End this process as the signal itself would have."""
    _say(f"a second signal, {signal.Signals(number).name}: stopped at once, what was not saved is lost")
    os._exit(128 + number)


def ignore() -> None:
    """Let no signal disturb the rest of this process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def seconds(duration: str | int) -> int:
    """Seconds of a duration such as 3h30m, 45s or 2d, or of a bare number of them. Raises UserError."""
    text = str(duration)
    parts = _DURATION.fullmatch(text)
    counted = int(text) if text.isdecimal() else 0
    if parts:
        counted = sum(int(count or 0) * unit for count, unit in zip(parts.groups(), _UNITS.values(), strict=True))
    if counted == 0:
        raise UserError(f"found {duration!r}, must be a time such as 3h30m, 90m, 2d or a number of seconds, above 0")
    return counted


def launched_at() -> float:
    """time.monotonic() at which this job was launched; now, if it is no launcher's."""
    return float(os.environ.get(LAUNCHED) or time.monotonic())


def _say(line: str) -> None:
    os.write(2, f"flame: {line}\n".encode())  # in a signal handler: the streams may be in the middle of a write
