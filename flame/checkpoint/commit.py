"""The commit marker of a checkpoint: written last, it lists what each file must be. Imports no torch.

A checkpoint without a marker, of torchtitan or of flame before it wrote markers, is complete if its metadata and the
files that it names exist and are large enough.
"""

import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count
from pathlib import Path
from typing import Any

import xxhash

from flame.checkpoint.metadata import METADATA, Metadata, is_plain, parse_metadata
from flame.config.files import read_bytes, read_json, regular
from flame.errors import UserError
from flame.runtime.atomic import write_atomically
from flame.runtime.environment import versions

MARKER = "complete.json"
EXPECTS_MARKER = f"+{MARKER}"  # how the save id in .metadata ends when a marker was to be written
BLOCK_BYTES = 8 << 20
DELETING = ".deleting-"  # before the name of a checkpoint that is being deleted


@dataclass(frozen=True)
class SavedFile:
    """A file of a checkpoint as it was written: its size in bytes and its hash."""

    name: str
    size: int
    xxh3_128: str


@dataclass(frozen=True)
class Status:
    """What the names and sizes of a checkpoint's files tell.

    corruption: what is wrong, naming the file; None if the checkpoint is complete. resumable: it is complete and holds
    more than the model, which is all that last_save_model_only saves. unfinished: its save never ended, as it has no
    marker, and no metadata or such as expects one.
    """

    corruption: str | None = None
    resumable: bool = False
    unfinished: bool = False


class _MarkerMissingError(ValueError):
    """A save ended between the metadata and the marker that they announce."""


def write_marker(checkpoint: Path, files: Iterable[SavedFile], facts: Mapping[str, Any]) -> None:
    """Make a checkpoint complete: the marker holds `facts`, the files and the versions, and a hash of all that."""
    listed = {file.name: {"size": file.size, "xxh3_128": file.xxh3_128} for file in files}
    content = {**facts, "files": listed, "versions": versions()}
    text = json.dumps({**content, "xxh3_128": _hash_json(content)}, indent=2) + "\n"
    write_atomically(checkpoint / MARKER, text, fsync=True)


def read_marker(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint's marker, {} if it has none.

    Raises ValueError if the marker is corrupted, and UserError if it cannot be read or another program wrote it.
    """
    path = checkpoint / MARKER
    try:
        with report_unreadable(path):
            content = read_json(path)
        expected, found = content.pop("xxh3_128"), _hash_json(content)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except UserError:
        raise
    except (ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"{MARKER} is corrupted ({type(error).__name__}: {error})") from None
    if found != expected:
        raise ValueError(f"{MARKER} is corrupted (its hash is {found}, must be {expected})")
    if wrong := _wrong_fields(content):
        hint = "another version of flame may have written it, and know what it means; move it away to do without"
        raise UserError(str(path), wrong, "as this version of flame writes it", hint)
    return content


def inspect_checkpoint(checkpoint: Path) -> Status:
    """Check the names and sizes of a checkpoint's files.

    Raises UserError if a file is there and cannot be read: it may be intact.
    """
    unfinished = False
    try:
        with report_unreadable(checkpoint):
            if marker := read_marker(checkpoint):
                sizes, resumable = {name: file["size"] for name, file in marker["files"].items()}, marker["resumable"]
                if METADATA not in sizes:
                    raise ValueError(f"{MARKER} does not list {METADATA}")
            else:
                sizes, resumable = _sizes_by_metadata(read_bytes(checkpoint / METADATA))
            for name, size in sizes.items():
                status = (checkpoint / name).stat()
                if not stat.S_ISREG(status.st_mode):
                    raise ValueError(f"{name} is not a file")
                found = status.st_size
                if found != size and (marker or found < size):  # without a marker only the last byte in use is known
                    raise ValueError(f"{name} has {found:,} bytes, must have {size:,}")
    except (FileNotFoundError, NotADirectoryError) as error:
        corruption = f"{Path(error.filename).name} is missing"
        unfinished = not any((checkpoint / name).exists() for name in (MARKER, METADATA))
    except UserError:
        raise
    except _MarkerMissingError as error:
        corruption, unfinished = str(error), True
    except ValueError as error:
        corruption = str(error)
    else:
        return Status(resumable=resumable)
    return Status(corruption, unfinished=unfinished)


def read_metadata(checkpoint: Path) -> Metadata:
    """The metadata of a checkpoint. Raises UserError if it has none, or another file in its place."""
    path = checkpoint / METADATA
    try:
        with report_unreadable(path):
            return parse_metadata(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(str(checkpoint), f"no {METADATA}", "a complete DCP checkpoint") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(path), error, "the metadata of a DCP checkpoint") from None


def verify_hashes(checkpoint: Path, rank: int = 0, world_size: int = 1) -> list[str]:
    """Hash the files that fall to this rank; returns what is wrong with each. Without a marker nothing is known.

    Raises UserError if a file cannot be read.
    """
    problems = []
    try:
        listed = read_marker(checkpoint).get("files", {})
    except UserError:
        raise
    except ValueError as error:  # it was damaged since the checkpoint was found
        return [str(error)]
    for name, file in sorted(listed.items())[rank::world_size]:
        try:
            with report_unreadable(checkpoint / name):
                found = hash_file(checkpoint / name)
        except FileNotFoundError:
            problems.append(f"{name} is missing")
            continue
        if found != (saved := file["xxh3_128"]):
            problems.append(f"{name} holds other bytes than were saved (its hash is {found}, must be {saved})")
    return problems


def hash_file(path: Path, algorithm: Callable[[], Any] = xxhash.xxh3_128) -> str:
    """The hash of a file's bytes, in hexadecimal; `algorithm` is as in hashlib. Raises OSError."""
    digest, buffer = algorithm(), memoryview(bytearray(BLOCK_BYTES))
    with open(path, "rb", buffering=0, opener=regular) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


@contextmanager
def report_unreadable(path: Path) -> Iterator[None]:
    """A block that reads a file. Raises UserError if the file is there and cannot be read: it may be intact."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise _unreadable(path, error) from None


def scan_checkpoints(folder: str | Path) -> dict[int, Status]:
    """{step: status} of the checkpoints in `folder`, ascending. Raises as `inspect_checkpoint` does."""
    return {step: inspect_checkpoint(path) for step, path in find_checkpoints(folder).items()}


def complete_steps(folder: str | Path) -> list[int]:
    """The steps of the complete checkpoints in `folder`, ascending. Raises as `inspect_checkpoint` does."""
    return [step for step, status in scan_checkpoints(folder).items() if not status.corruption]


def find_checkpoints(folder: str | Path) -> dict[int, Path]:
    """{step: path} of the checkpoints in `folder`, complete or not, ascending.

    Raises UserError for a folder or link that cannot be followed, and for a name such as step-002.
    """
    found = {}
    try:
        with os.scandir(folder) as entries:  # glob finds nothing, and raises nothing, in a folder that it may not read
            for entry in entries:
                if (match := re.fullmatch(r"step-(\d+)", entry.name)) and not entry.is_file():
                    step, path = int(match[1]), Path(entry.path)
                    if match[1] != str(step):
                        raise UserError(str(path), allowed=f"called step-{step}, or moved away")
                    os.stat(path)
                    found[step] = path
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not os.path.lexists(folder):
            return {}
        raise _unreadable(Path(folder), error) from None  # perhaps a link to a disk that is not mounted
    return dict(sorted(found.items()))


def remove_incomplete(checkpoint: Path) -> None:
    """Delete a checkpoint as far as possible, unless it is complete or cannot be read."""
    with suppress(UserError):
        if inspect_checkpoint(checkpoint).corruption:
            shutil.rmtree(checkpoint, ignore_errors=True)


def find_added(checkpoint: Path) -> list[str]:
    """The files in a checkpoint, by their relative paths, that its save did not write and whose names are not hidden.

    None are known without a marker. Raises OSError, and ValueError or UserError as `read_marker` does.
    """
    if not (marker := read_marker(checkpoint)):
        return []
    names = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("[!.]*") if not path.is_dir())
    return sorted(set(names) - {*marker["files"], MARKER})


def mark_for_deletion(checkpoint: Path) -> Path:
    """Rename a checkpoint before its deletion, so that the next start can finish one that is cut short.

    Returns the new path. Raises OSError.
    """
    target = _free(checkpoint.with_name(f"{DELETING}{checkpoint.name}"))
    os.rename(checkpoint, target)
    if target.is_symlink():  # what it names is left alone
        target.unlink()
    return target


def pending_deletions(folder: Path) -> list[Path]:
    """The checkpoints in `folder` whose deletion was cut short."""
    return sorted(folder.glob(f"{DELETING}step-*"))


def archive(checkpoint: Path) -> Path:
    """Move a checkpoint of an abandoned branch of the run to replaced/, out of rotation and resume.

    Returns the new path. Raises OSError.
    """
    target = _free(checkpoint.parent / "replaced" / checkpoint.name)
    target.parent.mkdir(exist_ok=True)
    os.replace(checkpoint, target)
    return target


def _free(path: Path) -> Path:
    """The path, or the first of path.2, path.3 and so on that does not exist."""
    names = chain([path], (path.with_name(f"{path.name}.{n}") for n in count(2)))
    return next(name for name in names if not os.path.lexists(name))


def _unreadable(path: Path, error: OSError) -> UserError:
    hint = f"cannot be read ({error.strerror}) and may be intact; try again, or move it away"
    return UserError(str(error.filename or path), hint=hint)  # an error of read() names no file


@lru_cache(maxsize=4)  # that of a large model takes seconds, and is parsed more than once at a start
def _sizes_by_metadata(data: bytes) -> tuple[dict[str, int], bool]:
    """({file: bytes in use}, resumable) by .metadata.

    Raises ValueError if it is corrupted, and _MarkerMissingError if it expects a marker.
    """
    try:
        metadata = parse_metadata(data)
    except ValueError as error:
        raise ValueError(f"{METADATA} is corrupted ({error})") from None
    if metadata.save_id.endswith(EXPECTS_MARKER):
        raise _MarkerMissingError(f"{MARKER} is missing")
    return {METADATA: len(data), **metadata.file_sizes()}, "train_state.step" in metadata.tensors


def _wrong_fields(marker: Mapping[str, Any]) -> str:
    """What of a marker this version cannot read; "" if nothing."""
    optional = {"step": int, "tokens": int, "data_digest": str, "config": dict}
    kinds = {"files": dict, "resumable": bool, **{name: kind for name, kind in optional.items() if name in marker}}
    for name, kind in kinds.items():
        if not isinstance(value := marker.get(name), kind):
            return f"{name} {str(value)[:40]}"
    for name, file in marker["files"].items():
        known = isinstance(file, dict) and isinstance(file.get("size"), int) and isinstance(file.get("xxh3_128"), str)
        if not known or not is_plain(name):
            return f"the file {name[:40]!r}, {str(file)[:60]}"
    return ""


def _hash_json(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
