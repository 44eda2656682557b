"""One run at a time in a run folder: its first rank holds a lock on a file there for as long as it lives.

A lock of POSIX, which the kernel takes back however the process ends, children do not inherit, and NFS passes on to
other nodes. Where a file system has locks of one node only, or none, a second start on another node goes unnoticed.
"""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from flame.errors import UserError

NAME = "lock"  # the file, which says who holds it; there while a run lives, or after one that was killed

logger = logging.getLogger("flame")


def check_free(folder: Path) -> None:
    """Raises UserError if a run is at work in a run folder. Changes nothing."""
    with suppress(FileNotFoundError), open(folder / NAME) as file:
        _take(file, fcntl.LOCK_SH, folder)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a run folder, which is made if there is none. Raises UserError if another process does."""
    path, made = folder / NAME, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _open(path, folder)
    except OSError as error:
        raise UserError(f"--job.dump_folder: {error}") from None
    with file:
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
                if made:
                    folder.rmdir()  # a run that was refused has put nothing there


def _open(path: Path, folder: Path) -> IO[str]:
    """The file, locked, with who holds it."""
    while True:
        file = open(path, "a+")  # noqa: SIM115 - open for as long as it is held
        try:
            _take(file, fcntl.LOCK_EX, folder)
            # A run that ends removes the file: a lock on what is no longer there holds nobody off.
            if _is(file, path):
                file.truncate(0)
                file.write(f"{socket.gethostname()}, process {os.getpid()}, since {time.strftime('%F %T %z')}")
                file.flush()
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _is(file: IO[str], path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _take(file: IO[str], kind: int, folder: Path) -> None:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # as POSIX leaves it to a system
        file.seek(0)
        raise UserError(
            f"--job.dump_folder: a run is at work in {folder} ({file.read()}); stop it, wait for its end, or give this "
            f"one another folder; if its node has died, delete {folder / NAME}"
        ) from None
    except OSError as error:
        logger.warning(f"{folder} cannot be locked ({error.strerror}): nothing keeps a second run out of it")
