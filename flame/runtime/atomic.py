"""Replacing a file in one step."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, data: str | bytes, fsync: bool = False) -> None:
    """Replace a file: a reader, or a kill, sees the old content or the new one. Raises OSError.

    fsync: the new content survives a power cut as well, where the file system can promise that.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        if fsync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)
    if fsync:
        with suppress(OSError):  # some file systems cannot sync a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write that replaces `path` at the end of the block, or is removed if the block raises. Raises OSError.

    Several processes may write the same path at once; each writes a temporary file of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
