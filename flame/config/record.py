"""The config.toml of a run folder: whether a run wrote it, and which run a job file in a run folder means."""

import os
from pathlib import Path
from typing import Any

import tomli
import tomli_w

from flame.config.files import read_text

NAME = "config.toml"
_SECTIONS = ("job", "model", "optimizer", "training", "parallelism", "checkpoint", "comm", "debug")  # a run writes all
_BESIDE = ("status.json", "metrics.jsonl", "environment.json")  # a run leaves one of them early


def read_record(run: Path) -> dict[str, Any] | None:
    """The tables of a run folder's config.toml; None if there is none that a run wrote."""
    try:
        tables = tomli.loads(read_text(run / NAME))
    except (OSError, ValueError, RecursionError):
        return None
    return tables if all(isinstance(tables.get(name), dict) for name in _SECTIONS) else None


def run_of(file: str) -> Path | None:
    """The run folder whose config.toml a file is; None for any other file."""
    path = Path(file).expanduser()
    for known in (Path(os.path.abspath(path)), Path(os.path.realpath(path))):
        folder = known.parent
        if known.name == NAME and (tables := read_record(folder)) is not None:
            saved = str(tables["checkpoint"].get("folder", "checkpoint"))
            if any((folder / name).exists() for name in (*_BESIDE, saved)):
                return folder
    return None


def has_comments(text: str) -> bool:
    """Whether a config.toml has comments, which no run writes and a run that wrote it anew would lose."""
    if "#" not in text:
        return False
    try:
        return tomli_w.dumps(tomli.loads(text)) != text
    except (ValueError, RecursionError):
        return True
