"""The one exception that means "the user can mend this": shown as one line, exit code 2, never a traceback."""


class UserError(ValueError):
    """One line that names the flag or file, what was found there, and what is allowed."""
