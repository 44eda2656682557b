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
    """Raises UserError if a run is at work in a run folder, or if that cannot be seen. Changes nothing."""
    try:
        with suppress(FileNotFoundError), open(folder / NAME, "rb", buffering=0) as file:
            _take(file, fcntl.LOCK_SH, folder)
    except OSError as error:
        raise UserError(f"--job.dump_folder: {error}") from None


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
            _sign(file, path)
            yield
        finally:
            with suppress(OSError):
                if _is(file, path):  # not once somebody deleted it, and another run has one of its own
                    path.unlink()
                if made:
                    folder.rmdir()  # a run that was refused has put nothing there


def _open(path: Path, folder: Path) -> IO[bytes]:
    """The file, locked."""
    while True:
        file = open(path, "a+b", buffering=0)  # noqa: SIM115 - open for as long as it is held
        try:
            _take(file, fcntl.LOCK_EX, folder)
            # A run that ends removes the file: a lock on what is no longer there holds nobody off.
            if _is(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _sign(file: IO[bytes], path: Path) -> None:
    """Write who holds it."""
    try:
        file.truncate(0)
        file.write(f"{socket.gethostname()}, process {os.getpid()}, since {time.strftime('%F %T %z')}".encode())
    except OSError as error:
        raise UserError(f"--job.dump_folder: {path} cannot be written ({error.strerror})") from None


def _is(file: IO[bytes], path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _take(file: IO[bytes], kind: int, folder: Path) -> None:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # as POSIX leaves it to a system
        file.seek(0)
        who = file.read().decode()
        raise UserError(
            f"--job.dump_folder: a run is at work in {folder} ({who}); stop it, wait for its end, or give this "
            f"one another folder; if its node has died, delete {folder / NAME}"
        ) from None
    except OSError as error:
        logger.warning(f"{folder} cannot be locked ({error.strerror}): nothing keeps a second run out of it")
