"""Copies and indices of local files, each made once for all processes, in `flame/` in the cache of `datasets`.

Their names depend on the path, size and age of the file, so that they are made again when the file changes.
"""

import io
import logging
import lzma
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from flame.config.files import regular
from flame.config.paths import COMPRESSED, ending
from flame.errors import UserError
from flame.runtime.atomic import open_atomically

CHUNK = 1 << 24  # bytes
LARGE = 1 << 26  # bytes, of a file about which the log says what is made of it
SECONDS = 10  # between two such lines

logger = logging.getLogger("flame")


@contextmanager
def open_decompressed(path: Path) -> Iterator[Any]:
    """The bytes of a file, decompressed if its name ends as a compressed file's does, as a binary stream.

    Raises OSError and, if the file is damaged, UserError, both in the block too.
    """
    import pyarrow

    codec = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}.get(path.suffix.lower())
    with open(path, "rb", opener=regular) as file:
        try:
            if path.suffix.lower() == ".xz":
                with lzma.open(file) as stream:
                    yield stream
            else:
                yield io.BufferedReader(pyarrow.input_stream(file, compression=codec)) if codec else file
        except (EOFError, lzma.LZMAError, OSError) as error:
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
    that was killed has left. Raises what `write` does, and OSError.
    """
    path = _find_place(Path(file), suffix)
    if path.exists():
        return str(path)
    lock = FileLock(path.with_name("lock"))
    try:
        lock.acquire(timeout=1)  # second
    except Timeout:
        logger.info(f"{file}: waiting for another process that is at work in {path.parent}")
        lock.acquire()
    try:
        if not path.exists():
            for leftover in path.parent.glob("*.tmp"):
                leftover.unlink()
            _write(path, file, work, write)
    finally:
        lock.release()
    return str(path)


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
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (blake2b(key, digest_size=12).hexdigest() + suffix)
