"""Checkpoints that are complete by their markers, and hold nothing."""

from pathlib import Path
from typing import Any

import xxhash

from flame.checkpoint.commit import SavedFile, write_marker
from flame.checkpoint.metadata import METADATA


def empty_file(name: str) -> SavedFile:
    """What a marker lists for an empty file."""
    return SavedFile(name, 0, xxhash.xxh3_128_hexdigest(b""))


def write_empty(checkpoint: Path, **facts: Any) -> None:
    """Write a checkpoint without a tensor; facts: of its marker."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / METADATA).touch()
    write_marker(checkpoint, [empty_file(METADATA)], {"resumable": True, **facts})
