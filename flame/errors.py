"""The exceptions that are shown as one line and never as a traceback, and how a rank ends that has said why it does."""

import errno

REFUSED = 2  # a UserError
FAILED = 3  # a SaveError or NonFiniteError; flame.launch makes it 1, and shows the traceback of a rank that ends with 1
EXHAUSTED = 4  # the data ended early, which data.exhausted_exit_code calls a failure; flame.launch makes it 1
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again
INTERRUPTED = 130  # by Ctrl-C, as shells say it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errnos of a disk, a quota or a file that takes no more


class UserError(ValueError):
    """What the user can mend, exit code 2: names the flag or file, what was found there, and what is allowed."""


class SaveError(RuntimeError):
    """A checkpoint could not be saved: the disk is full, or may not be written to. Exit code 1."""


class NonFiniteError(RuntimeError):
    """The loss, a gradient or the state of a run is NaN or infinite, and it may not go on. Exit code 1."""
