"""Megatron's indexed data, read and written: PREFIX.bin, token ids, and PREFIX.idx, where each sequence begins.

.idx, little-endian: magic, version (u64), dtype code (u8), number of sequences (u64), number of document bounds (u64),
lengths (i32, one per sequence), byte offsets (i64, one per sequence), document bounds (i64, counted in sequences, from
0 to their number). Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

import os
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flame.data.cursor import Encoder, encode, without_tokens
from flame.data.document import NAMED, Bad, Document, accept, allow_bad
from flame.errors import UserError
from flame.runtime.atomic import open_atomically

if TYPE_CHECKING:  # a source may be of this format
    from flame.data.source import Source

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats
SMALL = 65500  # vocabularies below it are written as u16
BLOCK = 1024  # rows tokenized together when sources are written


class _Index:
    """One .bin and its .idx, mapped into memory."""

    def __init__(self, prefix: str) -> None:
        self.path, index = prefix + ".bin", prefix + ".idx"
        with open(index, "rb") as file:
            head = file.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise UserError(index, repr(head[:9]), "a Megatron index, which begins with MMIDIDX")
        _, version, code, sequences, bounds = HEADER.unpack(head)
        if version != 1 or code not in CODES:
            found = f"version {version} and dtype code {code}"
            raise UserError(index, found, f"version 1 and one of the codes {', '.join(map(str, CODES))}")
        size, needed = os.path.getsize(index), HEADER.size + 12 * sequences + 8 * bounds
        if size < needed or not bounds:  # one byte per sequence, its mode, may follow
            raise UserError(index, f"{size} bytes for {sequences} sequences", f"{needed} or more", "cut short")
        self._dtype = np.dtype(CODES[code])
        at = HEADER.size
        self._lengths = _map(index, "<i4", at, sequences)
        self._offsets = _map(index, "<i8", at + 4 * sequences, sequences)
        self._bounds = _map(index, "<i8", at + 12 * sequences, bounds)
        end = int(self._offsets[-1]) + int(self._lengths[-1]) * self._dtype.itemsize if sequences else 0
        if self._bounds[-1] != sequences or os.path.getsize(self.path) < end:
            raise UserError(self.path, hint=f"not the data of {index}, or cut short")
        self._tokens = _map(self.path, "u1", 0, end)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def document(self, row: int) -> np.ndarray:
        """All sequences of a document, joined."""
        first, last = self._bounds[row : row + 2]
        begins = self._offsets[first:last]
        ends = begins + self._lengths[first:last] * np.int64(self._dtype.itemsize)
        if not 0 <= first <= last or (begins < 0).any() or (ends < begins).any() or (ends > len(self._tokens)).any():
            raise UserError(self.path, hint=f"not the data of its .idx, or damaged: document {row} lies outside")
        parts = [self._tokens[begin:end].view(self._dtype) for begin, end in zip(begins, ends, strict=True)]
        return np.concatenate(parts) if parts else np.empty(0, self._dtype)


def _map(path: str, dtype: str, offset: int, count: int) -> np.ndarray:
    return np.memmap(path, dtype, "r", offset, (count,)) if count else np.empty(0, dtype)


class IndexedRows:
    """The documents of .bin/.idx pairs, as token ids. Raises UserError for files cut short or not of this format."""

    def __init__(self, prefixes: Sequence[str]) -> None:
        self._files = [_Index(prefix) for prefix in prefixes]
        self._firsts = np.cumsum([0, *map(len, self._files)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def texts(self, indices: Sequence[int]) -> list[Document | Bad]:
        return [self._read(index) for index in indices]

    def _read(self, index: int) -> Document | Bad:
        owner = int(np.searchsorted(self._firsts, index, "right")) - 1
        file, row = self._files[owner], int(index - self._firsts[owner])
        return accept(file.document(row), f"{file.path}: document {row}")


def write(prefix: str | Path, documents: Iterable[np.ndarray], vocab_size: int) -> tuple[int, int]:
    """Write documents' ids, one sequence each; returns (documents, tokens).

    vocab_size decides the dtype, as in Megatron. The files appear under their names when both are whole. Raises
    UserError if there are no documents, or if one of the files exists, and OSError.
    """
    for path in (f"{prefix}.bin", f"{prefix}.idx"):
        if os.path.lexists(path):
            raise UserError("OUT", path, "the name of files that do not exist")
    dtype, code = (np.dtype("<u2"), 8) if vocab_size < SMALL else (np.dtype("<i4"), 4)
    lengths: list[int] = []
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    with open_atomically(Path(f"{prefix}.idx")) as index, open_atomically(Path(f"{prefix}.bin")) as data:
        for ids in documents:
            assert len(ids) and ids.min() >= 0 and ids.max() <= np.iinfo(dtype).max
            data.write(ids.astype(dtype).tobytes())
            lengths.append(len(ids))
        if not lengths:
            raise UserError(str(prefix), "no document to write")
        ends = np.cumsum([0, *lengths], dtype="<i8")
        index.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
        for array in (np.array(lengths, "<i4"), ends[:-1] * dtype.itemsize, np.arange(len(lengths) + 1, dtype="<i8")):
            index.write(array.tobytes())
    return len(lengths), int(ends[-1])


def encode_all(sources: "Sequence[Source]", tokenizer: Encoder, max_bad_rows: float) -> Iterator[np.ndarray]:
    """Ids of every document of the sources in their own order, the EOS last.

    Bad rows are skipped, the first of each source named on stderr. Raises UserError at more than max_bad_rows
    (see flame.data.document.allow_bad) in a source.
    """
    for source in sources:
        read = bad = 0
        for rows in source.blocks(BLOCK):
            documents = [row for row in rows if not isinstance(row, Bad)]
            encoded = encode(tokenizer, documents, source.name)
            skipped = [row for row in rows if isinstance(row, Bad)]
            skipped += [without_tokens(row) for row, ids in zip(documents, encoded, strict=True) if len(ids) == 0]
            for row in skipped[: max(NAMED - bad, 0)]:
                print(f"source {source.name}: {row.place} is skipped: {row.reason}", file=sys.stderr)
            bad += len(skipped)
            read += len(rows)
            if bad > (allowed := allow_bad(max_bad_rows, read)):
                found = f"{bad} bad rows among {read} of source {source.name}"
                raise UserError("--max-bad-rows", found, f"at most {allowed:g} (set to {max_bad_rows:g})")
            yield from (ids for ids in encoded if len(ids))
