"""Replacing a file in one step."""

import errno
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

HOST = socket.gethostname()


@contextmanager
def open_atomically(path: Path, fsync: bool = False) -> Iterator[BinaryIO]:
    """A file to write, which replaces `path` at the end of the block, or is removed if the block raises.

    A reader, or a kill, sees the old content or the new one. Several processes, of several nodes too, may write the
    same path at once. fsync: the new content survives a power cut as well, where the file system can promise that.
    Raises OSError.
    """
    temporary = path.with_name(f"{path.name}.{HOST}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a process that was killed; not written through if it is a link
        with open(temporary, "xb") as file:
            yield file
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if fsync:
        with suppress(OSError):  # some file systems cannot sync a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def write_atomically(path: Path, data: str | bytes, fsync: bool = False) -> None:
    """Replace a file as `open_atomically` does. Raises OSError."""
    with open_atomically(path, fsync) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def replace_together(files: Mapping[Path, str | bytes]) -> Iterator[None]:
    """Files that are replaced at the end of the block, in this order; none is if the content of one cannot be written.

    One process at a time may do this to a file; what killed ones left beside it is deleted. Raises OSError.
    """
    with ExitStack() as opened:
        for path, data in reversed([*files.items()]):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f"{path.name}.*.tmp"):
                left.unlink()
            file = opened.enter_context(open_atomically(path))
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()  # a full disk is known before the first of them is replaced
        yield
