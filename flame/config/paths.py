"""Tells paths on this machine from hub ids. Imports neither torch nor numpy."""

import os
from glob import glob

PATTERN = frozenset("*?[")  # characters of a glob pattern
_ENDINGS = (
    *(".json", ".jsonl", ".parquet", ".txt", ".arrow", ".toml", ".bin", ".idx"),
    *(".gz", ".zst", ".bz2", ".xz"),
)


def exists(path: str) -> bool:
    """Whether a path or glob pattern, ~ expanded, names anything on this machine."""
    # os.path, as pathlib raises where a name is too long or a folder may not be read
    path = os.path.expanduser(path)
    return os.path.exists(path) or bool(glob(path, recursive=True))


def is_local(name: str) -> bool:
    """Whether a name means a path on this machine, be it there or not, rather than a hub id or a URL."""
    if "://" in name:
        return False
    deep = name.startswith(("/", ".", "~")) or name.count("/") > 1  # a hub id is NAME or OWNER/NAME
    return deep or bool(PATTERN & set(name)) or name.endswith(_ENDINGS) or exists(name)
