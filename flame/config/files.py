"""Reads files that anybody may have written: regular files alone, and JSON however it is damaged."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from flame.errors import UserError


def regular(path: str | os.PathLike, flags: int) -> int:
    """An opener for `open`. Raises OSError for a pipe, a socket or a device, where a read may wait without end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # `open` itself rejects a folder
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))


def check_regular(setting: str, path: str | os.PathLike) -> None:
    """Raises UserError if a file, or one in a folder, is a pipe, a socket or a device: a library would wait for it."""
    for each in Path(path).iterdir() if os.path.isdir(path) else [Path(path)]:
        if each.exists() and not each.is_file() and not each.is_dir():
            raise UserError(setting, f"{each}, a pipe or a device", "a regular file")


def itself(path: str | os.PathLike, flags: int) -> int:
    """`regular` for a file that is written: a link is not followed, as that would change another file."""
    return regular(path, flags | os.O_NOFOLLOW)


def read_bytes(path: str | os.PathLike) -> bytes:
    """The content of a regular file. Raises OSError."""
    with open(path, "rb", opener=regular) as file:
        return file.read()


def read_text(path: str | os.PathLike) -> str:
    """The content of a regular file of UTF-8, without a byte-order mark. Raises OSError and ValueError."""
    return read_bytes(path).decode("utf-8-sig")


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, and ValueError for anything else, also if it is nested too deep."""
    content = parse_json(read_text(path))
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__}, not an object")
    return content


def parse_json(text: str | bytes, **options: Any) -> Any:
    """`json.loads`. Raises ValueError also for what is nested too deep."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("nested too deep") from None
