"""Lines of JSON with random access, by an index of where each line begins; a broken line costs that line only.

The index is made once and kept beside the cache of `datasets`, as are compressed files, unpacked.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flame.data.document import LONGEST, Bad, Document, accept
from flame.data.packed import PACKED, open_packed

CHUNK = 1 << 24  # bytes


class JsonLines:
    """A column of .jsonl files, plain or compressed: a row a line, in the order of the files."""

    def __init__(self, files: Sequence[str], column: str) -> None:
        self._column, self._names = column, list(files)
        self._paths = [_unpacked(Path(file)) for file in files]
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
        record = parse_line(line)
        if isinstance(record, str):
            return Bad(record, place)
        document = accept(record.get(self._column), place)
        if isinstance(document, str) and not document.isascii() and b"\\u" in line and not _encodes(document):
            return Bad("half a surrogate pair", place)
        return document


def parse_line(line: bytes) -> dict[str, Any] | str:
    """The object in a line, or why there is none."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "invalid UTF-8"
    except (ValueError, RecursionError) as error:
        return f"broken JSON ({error})" if line.strip() else "blank line"
    return record if isinstance(record, dict) else f"{type(record).__name__}, not a JSON object"


def describe_columns(files: Sequence[str], lines: int = 100) -> dict[str, str]:
    """{column: type of its first value that is not null} as the first lines that can be read have them."""
    types: dict[str, str] = {}
    for file in files:
        with open_packed(Path(file)) as stream:
            for _ in range(lines):
                line = stream.readline(CHUNK)
                if not line:
                    break
                record = parse_line(line)
                if isinstance(record, dict):
                    for column, value in record.items():
                        known = types.get(column, "NoneType")
                        types[column] = known if known != "NoneType" else type(value).__name__
        if types:
            break
    return types


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unpacked(path: Path) -> Path:
    if path.suffix not in PACKED:
        return path
    kept = _kept(path, ".jsonl")
    if not kept.exists():
        with open_packed(path) as stream, _replacing(kept) as out:
            while chunk := stream.read(CHUNK):
                out.write(chunk)
    return kept


def _index(path: Path) -> np.ndarray:
    """Where each line begins and, last, where the file ends; int64 (lines + 1,), mapped from disk."""
    kept = _kept(path, ".lines.npy")
    if not kept.exists():
        starts, at = [np.zeros(1, np.int64)], 0
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                starts.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + at + 1)
                at += len(chunk)
        ends = np.concatenate(starts)
        with _replacing(kept) as out:
            np.save(out, ends if ends[-1] == at else np.append(ends, at))
    return np.asarray(np.load(kept, mmap_mode="r"))  # a plain view of the map: np.memmap is slow to slice


def _kept(path: Path, ending: str) -> Path:
    """Where what is made of a file as it is now is kept."""
    from huggingface_hub.constants import HF_HOME

    # As in datasets.config, which takes its time to import.
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME, "datasets"))
    stat = path.stat()
    key = blake2b(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode(), digest_size=12).hexdigest()
    return cache / "flame" / (key + ending)


class _replacing:
    """A file that appears under its name when it is whole, whoever else is writing it too."""

    def __init__(self, path: Path) -> None:
        self._path, self._part = path, path.with_name(f"{path.name}.{os.getpid()}")

    def __enter__(self) -> Any:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._part, "wb")
        return self._file

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._file.close()
        if kind is None:
            os.replace(self._part, self._path)
        else:
            self._part.unlink()
