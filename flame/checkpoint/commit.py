"""What makes a checkpoint complete: a marker, written last, that says what each of its files must be. Imports no torch.

Checkpoints without a marker, of torchtitan or of flame before it wrote markers, are complete when their metadata and
the files it names are there, as long as it says.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count
from pathlib import Path
from typing import Any

import xxhash

from flame.checkpoint.safe_pickle import read_pickle
from flame.errors import UserError
from flame.runtime.versions import versions

MARKER, METADATA = "complete.json", ".metadata"
EXPECTS_MARKER = f"+{MARKER}"  # how the save id in .metadata ends when a marker was to follow
BLOCK_BYTES = 8 << 20
DELETING = ".deleting-"  # before the name of a checkpoint that is being deleted


@dataclass(frozen=True)
class SavedFile:
    """A file of a checkpoint as it was written: its size in bytes and its hash."""

    name: str
    size: int
    xxh3_128: str


def write_marker(checkpoint: Path, files: Iterable[SavedFile], facts: Mapping[str, Any]) -> None:
    """Make a checkpoint complete: `facts` of it, its files and the versions at work, under a hash of all that."""
    listed = {file.name: {"size": file.size, "xxh3_128": file.xxh3_128} for file in files}
    content = {**facts, "files": listed, "versions": versions()}
    temporary = checkpoint / f"{MARKER}.tmp"
    with open(temporary, "w") as file:
        file.write(json.dumps({**content, "xxh3_128": _hash_json(content)}, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, checkpoint / MARKER)
    with suppress(OSError):  # some file systems cannot: the name then lasts as long as theirs do
        folder = os.open(checkpoint, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_marker(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint's marker, {} if it has none.

    Raises ValueError if it is damaged, and UserError if it cannot be read.
    """
    try:
        content = json.loads((checkpoint / MARKER).read_bytes())
        said = content.pop("xxh3_128")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise _unreadable(error, checkpoint / MARKER) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MARKER} is damaged ({type(error).__name__}: {error})") from None
    if said != _hash_json(content):
        raise ValueError(f"{MARKER} is damaged (its hash is {_hash_json(content)}, must be {said})")
    return content


def invalidate(checkpoint: Path) -> None:
    """Make a checkpoint that is about to be overwritten incomplete; its marker goes first."""
    for name in (MARKER, METADATA):
        (checkpoint / name).unlink(missing_ok=True)


def find_corruption(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint as far as names and sizes tell, naming the file; None if nothing is.

    Raises UserError if that cannot be seen: what cannot be read today may be whole.
    """
    try:
        marker = read_marker(checkpoint)
        sizes = {name: file["size"] for name, file in marker["files"].items()} if marker else _read_sizes(checkpoint)
        for name, size in sizes.items():
            found = (checkpoint / name).stat().st_size
            if found != size and (marker or found < size):  # without a marker only the last byte in use is known
                return f"{name} has {found:,} bytes, must have {size:,}"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        raise _unreadable(error, checkpoint) from None
    except UserError:
        raise
    except ValueError as error:
        return str(error)
    return None


def verify_hashes(checkpoint: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """What is wrong with the bytes of every `ranks`-th file, which are hashed; nothing is known without a marker.

    Raises UserError if one cannot be read.
    """
    found = []
    for name, file in sorted(read_marker(checkpoint).get("files", {}).items())[rank::ranks]:
        try:
            seen = hash_file(checkpoint / name)
        except FileNotFoundError:
            found.append(f"{name} is missing")
            continue
        except OSError as error:
            raise _unreadable(error, checkpoint / name) from None
        if seen != file["xxh3_128"]:
            found.append(f"{name} holds other bytes than were saved (its hash is {seen}, must be {file['xxh3_128']})")
    return found


def hash_file(path: Path) -> str:
    """The xxh3_128 of a file, in hexadecimal."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def is_resumable(checkpoint: Path) -> bool:
    """Whether a complete checkpoint holds more than the model, which is all that last_save_model_only saves."""
    if marker := read_marker(checkpoint):
        return marker["resumable"]
    return "train_state.step" in read_pickle((checkpoint / METADATA).read_bytes()).state["state_dict_metadata"]


def scan_checkpoints(folder: str | Path) -> dict[int, str | None]:
    """{step: what is wrong, None if nothing} of the checkpoints under `folder`, ascending. Raises as complaint does."""
    return {step: find_corruption(path) for step, path in sorted(_find(folder).items())}


def complete_steps(folder: str | Path) -> list[int]:
    """Steps of the complete checkpoints under `folder`, ascending. Raises as complaint does."""
    return [step for step, reason in scan_checkpoints(folder).items() if reason is None]


def is_unfinished(checkpoint: Path) -> bool:
    """Whether saving it never came to an end: what was complete once and is damaged still has one of the two."""
    return not any((checkpoint / name).exists() for name in (MARKER, METADATA))


def remove_incomplete(checkpoint: Path) -> None:
    """Delete a checkpoint, unless it is complete, as far as that is possible."""
    with suppress(UserError):
        if find_corruption(checkpoint) is not None:
            shutil.rmtree(checkpoint, ignore_errors=True)


def mark_for_deletion(checkpoint: Path) -> Path:
    """Give a checkpoint that is about to be deleted a name by which a start knows it should the deletion be cut short.

    Returns where it is now. Raises OSError.
    """
    target = _free(checkpoint.with_name(f"{DELETING}{checkpoint.name}"))
    os.rename(checkpoint, target)
    return target


def pending_deletions(folder: Path) -> list[Path]:
    """The checkpoints under `folder` whose deletion was cut short."""
    return sorted(folder.glob(f"{DELETING}step-*"))


def archive(checkpoint: Path) -> Path:
    """Move a checkpoint of a course that is left to replaced/, where rotation and resume do not look; returns where."""
    target = _free(checkpoint.parent / "replaced" / checkpoint.name)
    target.parent.mkdir(exist_ok=True)
    os.replace(checkpoint, target)
    return target


def _free(path: Path) -> Path:
    """The path, or the first of path.2, path.3 and so on that is not there."""
    names = chain([path], (path.with_name(f"{path.name}.{n}") for n in count(2)))
    return next(name for name in names if not os.path.lexists(name))


def _find(folder: str | Path) -> dict[int, Path]:
    try:
        with os.scandir(folder) as entries:  # glob finds nothing in a folder that it may not read, and says nothing
            found = {entry.name: Path(entry.path) for entry in entries if not entry.is_file()}
    except FileNotFoundError as error:
        if os.path.islink(folder):  # to a disk that is away
            raise _unreadable(error, Path(folder)) from None
        return {}
    except OSError as error:
        raise _unreadable(error, Path(folder)) from None
    steps = {path: match[1] for name, path in found.items() if (match := re.fullmatch(r"step-(\d+)", name))}
    for path, step in steps.items():
        if step != str(int(step)):
            raise UserError(f"{path} must be called step-{int(step)}, or be moved away")
        if not path.exists():
            raise _unreadable(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), path)
    return {int(step): path for path, step in steps.items()}


def _unreadable(error: OSError, path: Path) -> UserError:
    found = error.filename or path  # read() does not say
    return UserError(f"{found} cannot be read ({error.strerror}), and may be whole: try again, or move it away")


def _read_sizes(checkpoint: Path) -> dict[str, int]:
    """{file: bytes in use of it} as .metadata says. Raises ValueError if it is none, or a marker must be there."""
    status = (checkpoint / METADATA).stat()
    return _parse_sizes(checkpoint, status.st_mtime_ns, status.st_size)


@lru_cache  # a large model's takes seconds, and a start asks more than once
def _parse_sizes(checkpoint: Path, modified: int, size: int) -> dict[str, int]:
    data = (checkpoint / METADATA).read_bytes()
    try:
        fields = read_pickle(data).state
        origin, places = fields.get("storage_meta"), [place.state for place in fields["storage_data"].values()]
        promised = origin is not None and str(origin.state["save_id"]).endswith(EXPECTS_MARKER)
        sizes = {METADATA: len(data)}
        for place in places:
            end = place["offset"] + place["length"]
            sizes[place["relative_path"]] = max(end, sizes.get(place["relative_path"], 0))
    except Exception as error:  # a foreign or damaged pickle fails in whatever way it likes
        raise ValueError(f"{METADATA} is damaged ({type(error).__name__}: {error})") from None
    if promised:
        raise ValueError(f"{MARKER} is missing")
    return sizes


def _hash_json(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
