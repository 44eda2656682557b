"""Local text files, a row per file, and the standard library's source code."""

import sysconfig
from codecs import BOM_UTF8
from collections.abc import Sequence
from pathlib import Path

from flame.data.cache import open_decompressed
from flame.data.document import LONGEST, Bad, Document, accept
from flame.errors import UserError


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
        try:
            with open_decompressed(file) as stream:
                content = stream.read(most)
        except UserError as error:
            return Bad(error.hint, str(file))
        except OSError as error:
            raise UserError(str(file), hint=f"cannot be read: {error.strerror}") from error
        content = content.removeprefix(BOM_UTF8)
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
