"""The exceptions that are shown as one line and never as a traceback."""


class UserError(ValueError):
    """What the user can mend, exit code 2: names the flag or file, what was found there, and what is allowed."""


class SaveError(RuntimeError):
    """A checkpoint could not be saved: the disk is full, or may not be written to. Exit code 1."""


class NonFiniteError(RuntimeError):
    """The loss, a gradient or the state of a run is NaN or infinite, and it may not go on. Exit code 1."""
