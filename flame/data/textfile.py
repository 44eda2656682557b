"""Text files, each one document, read in place."""

from collections.abc import Sequence
from pathlib import Path

from flame.data.document import LONGEST, Bad, Document, accept
from flame.data.packed import open_packed


class TextFiles:
    """A row a file, plain or compressed, in the order of the files."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = [Path(file) for file in files]

    def __len__(self) -> int:
        return len(self._files)

    def texts(self, indices: Sequence[int]) -> list[Document | Bad]:
        return [self._read(self._files[i]) for i in indices]

    def _read(self, file: Path) -> Document | Bad:
        most = 4 * LONGEST + 1  # bytes: a character has up to four
        with open_packed(file) as stream:
            content = stream.read(most)
        if len(content) == most:
            return Bad(f"more than {LONGEST:,} characters", str(file))
        try:
            return accept(content.decode("utf-8"), str(file))
        except UnicodeDecodeError:
            return Bad("invalid UTF-8", str(file))
