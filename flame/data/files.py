"""Files read in place: compressed ones, text files of one document each, and the standard library's source code."""

import io
import lzma
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flame.data.document import LONGEST, Bad, Document, accept


def open_decompressed(path: Path) -> Any:
    """The bytes of a file, decompressed if its name ends as a compressed file's does, as a binary stream."""
    import pyarrow

    if path.suffix == ".xz":
        return lzma.open(path)
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="detect"))


class TextFiles:
    """A row per file, plain or compressed, in the order of the files."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = [Path(file) for file in files]

    def __len__(self) -> int:
        return len(self._files)

    def texts(self, indices: Sequence[int]) -> list[Document | Bad]:
        return [self._read(self._files[i]) for i in indices]

    def _read(self, file: Path) -> Document | Bad:
        most = 4 * LONGEST + 1  # bytes: a character has up to four
        with open_decompressed(file) as stream:
            content = stream.read(most)
        too_long = Bad(f"more than {LONGEST:,} characters", str(file))
        return too_long if len(content) == most else accept(content, str(file))


class LibraryFiles(TextFiles):
    """The Python standard library's own source, one row per file; what is not UTF-8 in them is replaced."""

    def __init__(self) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        excluded = {"site-packages", "dist-packages", "__pycache__"}
        found = sorted(path.relative_to(root) for path in root.rglob("*.py"))
        files = [root / path for path in found if not excluded & set(path.parts)]
        super().__init__([str(file) for file in files if file.stat().st_size])

    def _read(self, file: Path) -> Document | Bad:
        return file.read_text(encoding="utf-8", errors="replace")
