"""Writes docs/flags.md, every setting with its type, default and help: python scripts/flags_page.py"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import operator
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's flame

from flame.config import legacy
from flame.config.schema import JobConfig
from flame.config.setting import describe

PAGE = Path(__file__).parents[1] / "docs" / "flags.md"
INTRODUCTION = """# Flags

Written by `python scripts/flags_page.py` from `flame/config/schema.py`, torchtitan 0.2.2 and
`flame/config/legacy.py`; change it there. Every flag is a TOML key as well: `--training.steps 100` is `steps = 100`
under `[training]` of the file given by `--job.config_file`. A flag overrides the TOML, the TOML overrides the
default. `--flag value` and `--flag=value` are the same, so are `-` and `_`; a switch is turned on by `--section.name`
and off by `--section.no_name`; a list is `a,b`.
"""


def field_help(section: type, name: str) -> str:
    """The docstring under a field, on one line, from the class that redefines the field last."""
    for owner in section.__mro__:
        if name in vars(owner).get("__annotations__", {}):
            body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body
            for field, below in itertools.pairwise(body):
                if isinstance(field, ast.AnnAssign) and field.target.id == name and isinstance(below, ast.Expr):
                    return " ".join(below.value.value.split())
            return ""
    return ""


def rows(section: type, prefix: str) -> Iterator[str]:
    """A table row for each setting of a section and of the sections in it."""
    defaults: Any = section()
    for field in filter(operator.attrgetter("init"), dataclasses.fields(section)):
        if dataclasses.is_dataclass(field.type):
            yield from rows(field.type, f"{prefix}{field.name}.")
        else:
            default = getattr(defaults, field.name)
            shown = "none" if default is None else json.dumps(default)
            cells = (f"`--{prefix}{field.name}`", describe(field.type), f"`{shown}`", field_help(section, field.name))
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def older_rows() -> Iterator[str]:
    """A table row for each older spelling."""
    today = {path: f"`--{to}`" for path, to in legacy.RENAMED.items()}
    today |= {path: old.change.__doc__ or f"ignored: {old.ignored}" for path, old in legacy.CHANGED.items()}
    yield from (f"| `--{path}` | {today[path]} |" for path in sorted(today))


def page() -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    for section in dataclasses.fields(JobConfig):
        lines += [f"## {section.name}", "", "| Flag | Value | Default | Help |", "|---|---|---|---|"]
        lines += [*rows(section.type, f"{section.name}."), ""]
    lines += ["## Other spellings", "", "Names in flame 0.x and LLMonade, and second names of settings above.", ""]
    lines += ["| Spelling | Today |", "|---|---|", *older_rows()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
