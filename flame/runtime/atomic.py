"""Replacing a file in one step."""

import os
from contextlib import suppress
from pathlib import Path


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
