"""The command lines of flame.sh, which argparse reads: a mistake is one line, and exit code 2."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from flame.errors import REFUSED, as_line


class Parser(argparse.ArgumentParser):
    """argparse's, without abbreviations, the page of usage below a mistake, and empty words (of an unset variable)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.register("type", None, _filled)
        self.register("type", Path, lambda word: Path(_filled(word)))

    def add_subparsers(self, **options: Any) -> Any:
        """argparse's; the words of a command are left to the command's own parser."""
        self.register("type", None, str)
        return super().add_subparsers(**options)

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        self.exit(
            REFUSED, as_line(f"flame: {message.removeprefix('argument ')}; {self.prog} -h lists what there is") + "\n"
        )


def _filled(word: str) -> str:
    if not word:
        raise argparse.ArgumentTypeError("found '', must be a value")
    return word
