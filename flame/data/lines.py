"""Local JSON files with random access to their rows; a row that cannot be read costs that row only.

A file holds an object per line; what else is JSON is copied as such. Lines are found by an index.
"""

import json
import logging
import os
import re
from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flame.config.paths import ending
from flame.data import cache
from flame.data.document import IDS, LONGEST, TEXT, Bad, Document, accept, describe
from flame.errors import UserError

HEAD = 100  # lines, by which a file is judged
SURROGATE = re.compile("[\ud800-\udfff]")
SPACE = re.compile(r"\s*")

logger = logging.getLogger("flame")


class JsonLines:
    """A column of JSON files, plain or compressed: a row per line or item, in the order of the files.

    Raises UserError for a file that is damaged, and OSError.
    """

    def __init__(self, files: Sequence[str], column: str) -> None:
        self._column, self._names = column, list(files)
        self._paths = [cache.decompress(as_lines(file)) for file in files]
        self._modified = [os.stat(path).st_mtime_ns for path in self._paths]
        self._starts = [index_lines(path) for path in self._paths]
        self._firsts = list(accumulate((len(starts) - 1 for starts in self._starts), initial=0))

    def __len__(self) -> int:
        return self._firsts[-1]

    def texts(self, indices: Sequence[int]) -> list[Document | Bad]:
        found: dict[int, Document | Bad] = {}
        for file, chosen in groupby(sorted(set(indices)), lambda i: bisect_right(self._firsts, i) - 1):
            try:
                with open(self._paths[file], "rb") as lines:
                    self._check_unchanged(file, os.fstat(lines.fileno()))
                    for index in chosen:
                        found[index] = self._read(lines, file, index - self._firsts[file])
            except OSError as error:
                raise UserError(self._names[file], hint=f"cannot be read: {error.strerror}") from error
        return [found[index] for index in indices]

    def _check_unchanged(self, file: int, status: os.stat_result) -> None:
        """Raise UserError for another size; another age, which a mere touch gives, is logged."""
        if status.st_size != self._starts[file][-1]:
            raise UserError(self._names[file], "another size", "that of the start of the run")
        if status.st_mtime_ns != self._modified[file]:
            self._modified[file] = status.st_mtime_ns
            logger.warning(
                f"{self._names[file]} was modified since the start of the run, which goes on with what it holds"
            )

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
        record = json.loads(line.removeprefix(BOM_UTF8).decode())
    except (ValueError, RecursionError) as error:
        if b"\0" in line:
            return Bad("UTF-16 or binary data, not UTF-8", place)
        if isinstance(error, UnicodeDecodeError):
            return Bad("invalid UTF-8", place)
        return Bad(f"broken JSON ({error})" if line.strip() else "blank line", place)
    return record if isinstance(record, dict) else Bad(f"{type(record).__name__}, not a JSON object", place)


def as_lines(file: str) -> str:
    """A JSON file whose lines are its rows: the file itself or, if it is an array or spread over lines, a copy.

    Raises UserError if such a file is not JSON, and OSError.
    """
    if _holds_lines(file):
        return file

    def write(out: BinaryIO) -> Iterator[int]:
        with cache.open_decompressed(Path(file)) as stream:
            text = stream.read()
        try:
            for row in _split(text.decode("utf-8-sig")):
                line = json.dumps(row if isinstance(row, dict) else {"text": row}, ensure_ascii=False)
                out.write(line.encode("utf-8", "surrogatepass") + b"\n")  # half a pair makes a bad row, as in a line
        except (ValueError, RecursionError) as error:
            raise UserError(file, hint=f"not valid JSON, {error}") from error
        yield len(text)

    return cache.make(file, ".rows.jsonl", "writing as lines", write)


def _split(text: str) -> Iterator[Any]:
    """The values in a text, and the items of those that are arrays."""
    decoder, at = json.JSONDecoder(), 0
    while (at := SPACE.match(text, at).end()) < len(text):  # type: ignore[union-attr]
        value, at = decoder.raw_decode(text, at)
        yield from value if isinstance(value, list) else [value]


def _holds_lines(file: str) -> bool:
    """Whether the rows of a file are its lines: so it is by its name, or if one of the first lines is an object."""
    if ending(file) != ".json":
        return True
    with cache.open_decompressed(Path(file)) as stream:
        for line in _read_head(stream):
            if line.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
                return False
            if isinstance(parse_line(line, file), dict):
                return True
    return False


def _read_head(stream: BinaryIO) -> Iterator[bytes]:
    """The first lines of a file, as far as they are not too long."""
    return islice(iter(lambda: stream.readline(cache.CHUNK), b""), HEAD)


def describe_columns(file: str) -> dict[str, str]:
    """{column: what it holds} in the first lines of a JSON file, where it holds text or token ids at all, these."""
    types: dict[str, str] = {}
    with cache.open_decompressed(Path(as_lines(file))) as stream:
        for line in _read_head(stream):
            record = parse_line(line, file)
            for column, value in record.items() if isinstance(record, dict) else ():
                if types.get(column) not in (TEXT, IDS):
                    types[column] = describe(value)
    return types


def index_lines(file: str) -> np.ndarray:
    """Where each line begins and, last, where the file ends; int64 (lines + 1,), mapped from disk."""

    def write(out: BinaryIO) -> Iterator[int]:
        starts, at = [np.zeros(1, np.int64)], 0
        with open(file, "rb") as stream:
            while chunk := stream.read(cache.CHUNK):
                starts.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + at + 1)
                at += len(chunk)
                yield len(chunk)
        ends = np.concatenate(starts)
        np.save(out, ends if ends[-1] == at else np.append(ends, at))

    made = cache.make(file, ".lines.npy", "indexing", write)
    return np.asarray(np.load(made, mmap_mode="r"))  # a plain view of the map: np.memmap is slow to slice
