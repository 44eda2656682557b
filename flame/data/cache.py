"""Copies and indices of local files, each made once for all processes, in `flame/` in the cache of `datasets`.

Their names depend on the path, size and age of the file, so that they are made again when the file changes.
"""

import fcntl
import gzip
import io
import logging
import lzma
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, BinaryIO

from flame.config.files import regular
from flame.config.paths import COMPRESSED, ending
from flame.errors import FULL, UserError
from flame.runtime.atomic import HOST, open_atomically

CHUNK = 1 << 24  # bytes
LARGE = 1 << 26  # bytes, of a file about which the log says what is made of it
SECONDS = 10  # between two such lines
DAY = 86400  # seconds

logger = logging.getLogger("flame")


@contextmanager
def open_decompressed(path: Path) -> Iterator[Any]:
    """The bytes of a file, decompressed if its name ends as a compressed file's does, as a binary stream.

    Raises OSError and, if the file is damaged, UserError, both in the block too.
    """
    import pyarrow

    suffix = path.suffix.lower()
    codec = {".zst": "zstd", ".bz2": "bz2"}.get(suffix)
    with open(path, "rb", opener=regular) as file:
        try:
            if suffix in (".gz", ".xz"):  # what pads such a file is no error to Python alone
                with gzip.open(file) if suffix == ".gz" else lzma.open(file) as stream:
                    yield stream
            else:
                yield io.BufferedReader(pyarrow.input_stream(file, compression=codec)) if codec else file
        except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
            if getattr(error, "errno", None) is not None:  # of the disk
                raise
            raise UserError(str(path), hint=f"cannot be decompressed, {error}") from error


def decompress(file: str) -> str:
    """The file itself or, if it is compressed, its copy that is not."""
    if Path(file).suffix.lower() not in COMPRESSED:
        return file

    def write(out: BinaryIO) -> Iterator[int]:
        with open_decompressed(Path(file)) as stream:
            while chunk := stream.read(CHUNK):
                out.write(chunk)
                yield len(chunk)

    return make(file, ending(file), "decompressing", write)


def make(file: str, suffix: str, work: str, write: Callable[[BinaryIO], Iterator[int]]) -> str:
    """Path of what `write` makes of a file, yielding the bytes done now and then; made if it is not there yet.

    suffix: of its name. work: what the log calls it. One process at a time makes something, and first removes what one
    that was killed has left. Raises what `write` does, OSError, and UserError for a folder without locks or room.
    """
    path = _find_place(Path(file), suffix)
    if path.exists():
        return str(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name("lock"), "ab")  # noqa: SIM115 - open for as long as it is held
    except OSError as error:
        raise _unusable(path.parent, error) from error
    with lock:
        _lock(lock, file, path.parent)
        if not path.exists():
            _remove_leftovers(path.parent)
            try:
                _write(path, file, work, write)
            except OSError as error:
                if error.errno not in FULL:  # it may be of the file that is read
                    raise
                raise _unusable(path.parent, error) from error
    return str(path)


def _lock(lock: IO[bytes], file: str, folder: Path) -> None:
    """Wait until no other process of this node, or where the file system shares locks, of any, holds the lock.

    The log says how far the other is: it may be of a rank whose lines are not shown.
    """
    to_say = time.monotonic() + 1
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
        except OSError as error:
            raise _unusable(folder, error) from error
        if time.monotonic() > to_say:
            done = f"{_unfinished_bytes(folder) >> 20:,} MiB so far"
            logger.info(f"{file}: waiting for another process that is at work in {folder}, {done}")
            to_say = time.monotonic() + SECONDS


def _unfinished_bytes(folder: Path) -> int:
    size = 0
    for path in folder.glob("*.tmp"):
        with suppress(OSError):  # it has just got its name
            size += path.stat().st_size
    return size


def _unusable(folder: Path, error: OSError) -> UserError:
    found = f"{folder}: {error.strerror}"
    return UserError("HF_DATASETS_CACHE", found, "a folder where files can be written and locked")


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob("*.tmp"):
        with suppress(OSError):  # another node may be at work, where locks are those of a node
            if f".{HOST}." in path.name or path.stat().st_mtime < time.time() - DAY:
                path.unlink()


def _write(path: Path, file: str, work: str, write: Callable[[BinaryIO], Iterator[int]]) -> None:
    size, done, said = os.path.getsize(file), 0, time.monotonic()
    if size >= LARGE:
        logger.info(f"{work} {file}, {size >> 20:,} MiB, once")
    with open_atomically(path) as out:
        for count in write(out):
            done += count
            if time.monotonic() - said >= SECONDS:
                logger.info(f"{work} {file}: {done >> 20:,} MiB so far")
                said = time.monotonic()


def _find_place(path: Path, suffix: str) -> Path:
    """Where what is made of a file, in its present size and age, is kept."""
    from huggingface_hub.constants import HF_HOME

    # As in datasets.config, which takes its time to import.
    folder = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME, "datasets"), "flame")
    stat = path.stat()
    key = os.fsencode(path.resolve()) + f"\0{stat.st_size}\0{stat.st_mtime_ns}".encode()
    return folder / (blake2b(key, digest_size=12).hexdigest() + suffix)
