"""A folder that appears whole or not at all, and the report in it: what it was made from and how that was checked."""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flame.errors import UserError
from flame.runtime.environment import versions

REPORT = "conversion_report.json"
_LOCK = ".lock"  # in a temporary folder, held for as long as it is worked on


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that is moved to `path` at the end, and deleted if anything fails; several may be made at once.

    Until then it lies beside `path` in a temporary one. Raises UserError if another got the name first.
    """
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    start = f".{path.name}.{socket.gethostname()}-"  # of other machines a lock may not be seen
    _clear(path.parent, start)
    temporary = Path(tempfile.mkdtemp(".tmp", start, path.parent))
    try:
        with open(temporary / _LOCK, "wb") as lock:
            with suppress(OSError):  # a file system without locks, where nothing is cleared either
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder = temporary / path.name
            folder.mkdir()
            yield folder
            try:
                os.rename(folder, path)
            except OSError as error:
                if not path.exists():
                    raise
                raise UserError(
                    f"{path}: was made by another in the meantime, and is left alone ({error.strerror})"
                ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # not empty
            for parent in made:
                parent.rmdir()


def _clear(parent: Path, start: str) -> None:
    """Delete what was left by those that were killed: nobody holds its lock any more."""
    for left in parent.iterdir():
        if left.name.startswith(start) and left.suffix == ".tmp":
            with suppress(OSError), open(left / _LOCK, "r+b") as lock:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)


def write_report(folder: Path, digests: dict[str, str], **fields: Any) -> None:
    """Write conversion_report.json: `fields`, the versions at work, and the sha256 of every file.

    digests: {file: sha256} of the files that were hashed already.
    """
    digests = {path.name: digests.get(path.name) or sha256(path) for path in sorted(folder.iterdir())}
    (folder / REPORT).write_text(json.dumps({**fields, "files": digests, "versions": versions()}, indent=2) + "\n")


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a folder, or {} if it has none that can be read."""
    try:
        report = json.loads((folder / REPORT).read_bytes())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while data := stream.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()
