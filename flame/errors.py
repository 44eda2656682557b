"""Exceptions that are shown as one line and never as a traceback, and the exit codes of a rank."""

import errno
from typing import Any

REFUSED = 2  # a UserError
FAILED = 3  # a SaveError or NonFiniteError; the launcher makes it 1, and shows the traceback of a rank that ends with 1
EXHAUSTED = 4  # the data ended early, which data.exhausted_exit_code calls a failure; the launcher makes it 1
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again
INTERRUPTED = 130  # by Ctrl-C, as shells say it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errnos of a disk, a quota or a file that takes no more


class UserError(ValueError):
    """A mistake that the user can correct, exit code 2: "SETTING: found FOUND, must be ALLOWED; HINT".

    setting: the flag, TOML key, file or variable, spelled as the user does. found, allowed, hint: "" leaves a part out.
    """

    def __init__(self, setting: str, found: Any = "", allowed: str = "", hint: str = "") -> None:
        super().__init__(setting, found, allowed, hint)  # what a pickle makes it from again, on other ranks
        self.setting, self.found, self.allowed, self.hint = setting, found, allowed, hint

    def __str__(self) -> str:
        rule = ", ".join(
            part
            for part, given in ((f"found {self.found}", self.found), (f"must be {self.allowed}", self.allowed))
            if given != ""
        )
        reason = "; ".join(filter(None, (rule, self.hint)))
        return as_line(f"{self.setting}: {reason}" if reason else str(self.setting))

    def at(self, setting: str) -> "UserError":
        """The same mistake under another setting."""
        return UserError(setting, self.found, self.allowed, self.hint)


class SaveError(RuntimeError):
    """A checkpoint could not be saved: the disk is full, or may not be written to. Exit code 1."""


class NonFiniteError(RuntimeError):
    """The loss, a gradient or the state of a run is NaN or infinite, and it may not go on. Exit code 1."""


def as_line(text: str) -> str:
    """A text as one line that any terminal can print; at most 2,000 characters, the middle left out."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return line if len(line) <= 2000 else f"{line[:1000]} ... {line[-900:]}"


def near_multiples(value: int, step: int) -> str:
    """The multiples of a step next to a value, as a UserError names them: "63 or 66"."""
    below = max(value, 0) // step * step
    return f"{below} or {below + step}" if below else f"{step}"


def first_line(error: BaseException) -> str:
    """An exception as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = " ".join(lines[:2]) if lines[0].endswith(":") and len(lines) > 1 else lines[0]  # the reason is below it
    return f"{type(error).__name__}: {said}"
