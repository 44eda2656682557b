"""The folder that a conversion makes: whole or not at all, with a report of what it was made from and its checks."""

import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from flame.checkpoint.commit import hash_file
from flame.config.files import read_json
from flame.convert.safetensors_file import find_files, read_headers
from flame.errors import UserError
from flame.runtime.environment import versions

REPORT = "conversion_report.json"
_OF_0_1_0 = "structure.json"  # in the record of a model
_LOCK = ".lock"  # in a temporary folder, held while it is worked on


_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.safetensors.index.json", "*.bin.index.json")


def copy_assets(source: Path, folder: Path) -> None:
    """Copy what a run recorded of its model but what an export has of its own, weights and report. Raises OSError."""
    folder.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.is_dir():
            copy_assets(path, folder / path.name)
        elif path.name not in (REPORT, _OF_0_1_0) and not any(map(path.match, _WEIGHTS)):
            shutil.copyfile(path, folder / path.name)


def check_new(flag: str, path: Path) -> None:
    """Raise UserError for a path at which no new folder can be made: something is there, or it is a URL."""
    if os.path.lexists(os.path.abspath(path)):
        raise UserError(flag, path, "a folder that does not exist")
    if path.parts[:1] and path.parts[0].endswith(":"):  # a Path has lost one slash of "s3://"
        raise UserError(flag, path, "a folder of this machine's file system")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that is moved to `path` at the end, and deleted if anything fails; several may be made at once.

    Until then it is in a temporary one beside `path`. Raises UserError if another process made `path` first.
    """
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    delete_abandoned(path.parent)
    temporary, lock = _make_temporary(path)
    try:
        with lock:
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


def delete_abandoned(parent: Path) -> None:
    """Delete the temporary folders of processes of this machine that were killed: nobody holds their locks any more."""
    for left in parent.iterdir() if parent.is_dir() else ():
        if not re.fullmatch(rf"\..+\.{re.escape(socket.gethostname())}-[a-z0-9_]{{8}}\.tmp", left.name):
            continue
        with suppress(OSError):  # it is worked on
            try:
                with open(left / _LOCK, "r+b") as lock:
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left, ignore_errors=True)
            except FileNotFoundError:  # killed before it made its lock; else it makes another folder
                left.rmdir()


def _make_temporary(path: Path) -> tuple[Path, IO[bytes]]:
    """A temporary folder beside a path, and the file in it that is locked while it is worked on."""
    prefix = f".{path.name}.{socket.gethostname()}-"  # a lock of another machine may not be visible
    while True:
        temporary = Path(tempfile.mkdtemp(".tmp", prefix, path.parent))
        with suppress(FileNotFoundError, BlockingIOError):  # another process has taken it for an abandoned one
            lock = open(temporary / _LOCK, "wb")  # noqa: SIM115 - open for as long as it is worked on
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise
            except OSError:  # a file system without locks, where nothing is deleted either
                return temporary, lock
            if (temporary / _LOCK).exists():
                return temporary, lock
            lock.close()


def write_report(folder: Path, digests: dict[str, str], **fields: Any) -> None:
    """Write conversion_report.json: `fields`, the package versions, and the sha256 of every file, in subfolders too.

    digests: {file: sha256} of the files that were hashed already.
    """
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    digests = {name: digests.get(name) or hash_file(path, sha256) for name, path in files.items()}
    (folder / REPORT).write_text(json.dumps({**fields, "files": digests, "versions": versions()}, indent=2) + "\n")


def origin_of(checkpoint: Path, dtype: str | None) -> dict[str, Any]:
    """What the report of an export says of the checkpoint, and of the type that its weights were cast to."""
    return {"metadata_sha256": hash_file(checkpoint / ".metadata", sha256), "dtype": dtype}


def is_exported(checkpoint: Path, folder: Path, dtype: str | None) -> bool:
    """Whether a folder is an export of this very checkpoint whose files are all there, as long as they must be."""
    report = read_report(folder)
    if not origin_of(checkpoint, dtype).items() <= report.items():
        return False
    try:
        return all((folder / name).is_file() for name in report["files"]) and bool(read_headers(find_files(folder)))
    except (OSError, UserError, KeyError, TypeError):
        return False


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a folder, or {} if it has none that can be read."""
    try:
        return read_json(folder / REPORT)
    except (OSError, ValueError):
        return {}
