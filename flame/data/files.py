"""Local files with random access to their rows: JSON lines, text files, and the standard library's source code.

A row that cannot be read costs that row only. Lines are found by an index, made once and kept beside the cache of
`datasets`, as are decompressed copies of compressed files.
"""

import io
import json
import lzma
import os
import re
import shutil
import sysconfig
from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flame.config.paths import COMPRESSED, ending
from flame.data.document import LONGEST, Bad, Document, accept
from flame.runtime.atomic import open_atomically

CHUNK = 1 << 24  # bytes
SURROGATE = re.compile("[\ud800-\udfff]")


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


class JsonLines:
    """A column of .jsonl files, plain or compressed: a row per line, in the order of the files."""

    def __init__(self, files: Sequence[str], column: str) -> None:
        self._column, self._names = column, list(files)
        self._paths = [_decompress(Path(file)) for file in files]
        self._starts = [_index(path) for path in self._paths]
        self._firsts = list(accumulate((len(starts) - 1 for starts in self._starts), initial=0))

    def __len__(self) -> int:
        return self._firsts[-1]

    def texts(self, indices: Sequence[int]) -> list[Document | Bad]:
        found: dict[int, Document | Bad] = {}
        for file, chosen in groupby(sorted(set(indices)), lambda i: bisect_right(self._firsts, i) - 1):
            with open(self._paths[file], "rb") as lines:
                for index in chosen:
                    found[index] = self._read(lines, file, index - self._firsts[file])
        return [found[index] for index in indices]

    def _read(self, lines: BinaryIO, file: int, row: int) -> Document | Bad:
        begin, end = self._starts[file][row : row + 2].tolist()
        place = f"{self._names[file]}:{row + 1}"
        if end - begin > 8 * LONGEST:  # not even read
            return Bad(f"a line of {end - begin:,} bytes", place)
        lines.seek(begin)
        line = lines.read(end - begin)
        record = parse_line(line, place)
        if isinstance(record, Bad):
            return record
        document = accept(record.get(self._column), place)
        if isinstance(document, str) and not document.isascii() and b"\\u" in line and SURROGATE.search(document):
            return Bad("half a surrogate pair", place)
        return document


def parse_line(line: bytes, place: str) -> dict[str, Any] | Bad:
    """The object in a line, or why there is none."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Bad("invalid UTF-8", place)
    except (ValueError, RecursionError) as error:
        return Bad(f"broken JSON ({error})" if line.strip() else "blank line", place)
    return record if isinstance(record, dict) else Bad(f"{type(record).__name__}, not a JSON object", place)


def is_json_lines(file: str) -> bool:
    """Whether a file holds an object per line: a .jsonl file does, and a .json file whose first line is one."""
    if ending(file) != ".json":
        return ending(file) == ".jsonl"
    with open_decompressed(Path(file)) as stream:
        return isinstance(parse_line(stream.readline(CHUNK), file), dict)


def describe_columns(files: Sequence[str], lines: int = 100) -> dict[str, str]:
    """{column: type of its first value that is not null} of the first file whose first lines hold an object."""
    types: dict[str, str] = {}
    for file in files:
        with open_decompressed(Path(file)) as stream:
            for line in islice(iter(lambda: stream.readline(CHUNK), b""), lines):
                record = parse_line(line, file)
                for column, value in record.items() if isinstance(record, dict) else ():
                    if types.get(column, "NoneType") == "NoneType":
                        types[column] = type(value).__name__
        if types:
            break
    return types


def _decompress(path: Path) -> Path:
    """The file itself or, if it is compressed, its decompressed copy in the cache."""
    if path.suffix not in COMPRESSED:
        return path
    cached = _cache_path(path, ".jsonl")
    if not cached.exists():
        with open_decompressed(path) as stream, open_atomically(cached) as out:
            shutil.copyfileobj(stream, out, CHUNK)
    return cached


def _index(path: Path) -> np.ndarray:
    """Where each line begins and, last, where the file ends; int64 (lines + 1,), mapped from disk."""
    cached = _cache_path(path, ".lines.npy")
    if not cached.exists():
        starts, at = [np.zeros(1, np.int64)], 0
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                starts.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + at + 1)
                at += len(chunk)
        ends = np.concatenate(starts)
        with open_atomically(cached) as out:
            np.save(out, ends if ends[-1] == at else np.append(ends, at))
    return np.asarray(np.load(cached, mmap_mode="r"))  # a plain view of the map: np.memmap is slow to slice


def _cache_path(path: Path, ending: str) -> Path:
    """Where what is derived from a file, in its present size and age, is cached."""
    from huggingface_hub.constants import HF_HOME

    # As in datasets.config, which takes its time to import.
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME, "datasets"))
    stat = path.stat()
    key = blake2b(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode(), digest_size=12).hexdigest()
    (cache / "flame").mkdir(parents=True, exist_ok=True)
    return cache / "flame" / (key + ending)
