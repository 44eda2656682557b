"""One run at a time in a run folder: its first rank holds a lock on a file there for as long as it lives.

A POSIX lock, which the kernel releases however the process ends, children do not inherit, and NFS shares among nodes.
On a file system without locks, or with locks of one node only, a second run from another node is not noticed.
"""

import fcntl
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from flame.config.files import itself
from flame.errors import UserError

NAME = "lock"  # the file, which names the holder; it exists while a run lives, and after one that was killed

_HOLDER = re.compile(rb".*, process \d+, since ")

logger = logging.getLogger("flame")


def check_free(folder: Path) -> None:
    """Changes nothing. Raises UserError if a run holds the folder, or if the lock cannot be read."""
    try:
        with suppress(FileNotFoundError), open(folder / NAME, "rb", buffering=0, opener=itself) as file:
            _lock(file, fcntl.LOCK_SH, folder)
            _check_ours(file, folder)
    except OSError as error:
        raise UserError("--job.dump_folder", hint=str(error)) from None


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a run folder, which is made if it does not exist. Raises UserError if another process holds it.

    A UserError of the block leaves no empty folder that was not there before.
    """
    path = folder / NAME
    try:
        before = set(folder.iterdir()) if folder.is_dir() else None
        folder.mkdir(parents=True, exist_ok=True)
        file = _open(path, folder)
    except OSError as error:
        raise UserError("--job.dump_folder", hint=str(error)) from None
    with file:
        try:
            _write_holder(file, path)
            yield
        except UserError:
            with suppress(OSError):
                for made in set(folder.iterdir()) - {path} - (before or set()):
                    _remove_empty(made)
            raise
        finally:
            with suppress(OSError):
                if _is_at(file, path):  # not if somebody deleted it, and another run has made its own
                    path.unlink()
                if before is None:
                    folder.rmdir()  # fails unless the run was rejected before it wrote anything


def _open(path: Path, folder: Path) -> IO[bytes]:
    """The file, locked."""
    while True:
        file = open(path, "a+b", buffering=0, opener=itself)  # noqa: SIM115 - open for as long as it is held
        try:
            _lock(file, fcntl.LOCK_EX, folder)
            _check_ours(file, folder)
            if _is_at(file, path):  # a run that ends deletes its file, and the lock of a deleted file excludes nobody
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _check_ours(file: IO[bytes], folder: Path) -> None:
    """Raises UserError for a file of the user's that happens to have this name."""
    file.seek(0)
    text = file.read() or b""
    if text and not _HOLDER.match(text):
        hint = f"{folder / NAME} is not that of a run, and would be overwritten; move it, or name another folder"
        raise UserError("--job.dump_folder", folder, "a new folder or that of a run", hint)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        for path in folder.iterdir():
            _remove_empty(path)
        folder.rmdir()


def _write_holder(file: IO[bytes], path: Path) -> None:
    try:
        file.truncate(0)
        file.write(f"{socket.gethostname()}, process {os.getpid()}, since {time.strftime('%F %T %z')}".encode())
    except OSError as error:
        raise UserError("--job.dump_folder", hint=f"{path} cannot be written ({error.strerror})") from None


def _is_at(file: IO[bytes], path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _lock(file: IO[bytes], kind: int, folder: Path) -> None:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows a system either
        file.seek(0)
        found = f"{folder}, where a run is at work ({file.read().decode()})"
        hint = f"stop it, wait for its end, or name another folder; if its node has died, delete {folder / NAME}"
        raise UserError("--job.dump_folder", found, hint=hint) from None
    except OSError as error:
        logger.warning(f"{folder} cannot be locked ({error.strerror}): a second run in it would not be noticed")
