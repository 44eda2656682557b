"""A folder that appears whole or not at all, and the report in it: what it was made from and how that was checked."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flame import __version__

REPORT = "conversion_report.json"
_PACKAGES = ("torch", "torchtitan", "flash-linear-attention", "transformers", "safetensors", "numpy")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that is renamed to it at the end, and deleted if anything fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # what one that was killed left behind
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_report(folder: Path, digests: dict[str, str], **fields: Any) -> None:
    """Write conversion_report.json: `fields`, the versions at work, and the sha256 of every file.

    digests: {file: sha256} of the files that were hashed already.
    """
    digests = {path.name: digests.get(path.name) or sha256(path) for path in sorted(folder.iterdir())}
    (folder / REPORT).write_text(json.dumps({**fields, "files": digests, "versions": versions()}, indent=2) + "\n")


def versions() -> dict[str, str]:
    """{package: version} of flame and of what checkpoints depend on."""
    found = {"flame": __version__}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a folder, or {} if it has none."""
    path = folder / REPORT
    return json.loads(path.read_text()) if path.is_file() else {}


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while data := stream.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()
