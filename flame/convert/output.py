"""The folder that a conversion makes: whole or not at all, with a report of what it was made from and its checks."""

import fcntl
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from flame.checkpoint.commit import hash_file
from flame.config.files import read_json
from flame.errors import UserError
from flame.runtime.environment import versions

REPORT = "conversion_report.json"
_LOCK = ".lock"  # in a temporary folder, held while it is worked on


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that is moved to `path` at the end, and deleted if anything fails; several may be made at once.

    Until then it is in a temporary one beside `path`. Raises UserError if another process made `path` first.
    """
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{socket.gethostname()}-"  # a lock of another machine may not be visible
    _delete_abandoned(path.parent, prefix)
    temporary = Path(tempfile.mkdtemp(".tmp", prefix, path.parent))
    try:
        with open(temporary / _LOCK, "wb") as lock:
            with suppress(OSError):  # a file system without locks, where nothing is deleted either
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder = temporary / path.name
            folder.mkdir()
            yield folder
            try:
                os.rename(folder, path)
            except OSError as error:
                if not path.exists():
                    raise
                reason = f"another process made it meanwhile, and it is left alone ({error.strerror})"
                raise UserError(str(path), hint=reason) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # not empty
            for parent in made:
                parent.rmdir()


def _delete_abandoned(parent: Path, prefix: str) -> None:
    """Delete the temporary folders of processes that were killed: nobody holds their locks any more."""
    for left in parent.iterdir():
        if left.name.startswith(prefix) and left.suffix == ".tmp":
            with suppress(OSError), open(left / _LOCK, "r+b") as lock:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)


def write_report(folder: Path, digests: dict[str, str], **fields: Any) -> None:
    """Write conversion_report.json: `fields`, the package versions, and the sha256 of every file.

    digests: {file: sha256} of the files that were hashed already.
    """
    digests = {path.name: digests.get(path.name) or hash_file(path, sha256) for path in sorted(folder.iterdir())}
    (folder / REPORT).write_text(json.dumps({**fields, "files": digests, "versions": versions()}, indent=2) + "\n")


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a folder, or {} if it has none that can be read."""
    try:
        return read_json(folder / REPORT)
    except (OSError, ValueError):
        return {}
