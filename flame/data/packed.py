"""Compressed files."""

import io
import lzma
from pathlib import Path
from typing import Any

PACKED = (".gz", ".zst", ".bz2", ".xz")


def open_packed(path: Path) -> Any:
    """The bytes of a file, unpacked if its name says that it is compressed, as a binary stream."""
    import pyarrow

    if path.suffix == ".xz":
        return lzma.open(path)
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="detect"))
