"""safetensors files, written and read a few MiB at a time: a length, a JSON header, then the tensors' bytes."""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash

from flame.checkpoint.dtypes import CODES, NAMES, READ_BYTES, SIZES, Box, as_bytes, read_box, split_box
from flame.checkpoint.structure import ConversionError, TensorSpecs
from flame.errors import UserError

T = TypeVar("T")
Pieces = Iterable[tuple[Box, np.ndarray]]  # of a tensor: raw elements and their place
HEADER_BYTES = 100 << 20  # the limit of the safetensors library
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a safetensors file; dtype is torch's name for it, `start` the offset of its first byte."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]

    def pieces(self, box: Box | None = None) -> Iterator[tuple[Box, np.ndarray]]:
        """The raw elements of a box, or of all, READ_BYTES at a time in row-major order, each with its own box.

        Raises UserError if the file ends early.
        """
        box = box if box is not None else tuple((0, size) for size in self.shape)
        if any(start == stop for start, stop in box):
            return
        for piece in split_box(box, READ_BYTES // SIZES[self.dtype]):
            try:
                yield piece, read_box(self.file, self.start, self.dtype, self.shape, piece)
            except EOFError:
                raise UserError(str(self.file), hint="ended while it was read") from None


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of a file. Raises UserError if it is not a whole safetensors file."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(HEADER_BYTES, size):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        entries = {}
        for name, field in header.items():
            if name != "__metadata__":
                start, stop = field["data_offsets"]
                entry = TensorEntry(NAMES[field["dtype"]], tuple(field["shape"]), file, 8 + length + start)
                if start < 0 or stop - start != entry.nbytes or entry.start + entry.nbytes > size:
                    raise ValueError(f"{name} has bytes {start} to {stop} of a file of {size}")
                entries[name] = entry
        return entries
    except OSError as error:
        raise UserError(str(file), hint=f"cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(str(file), f"{type(error).__name__}: {error}", "a whole safetensors file") from None


def read_headers(files: Iterable[Path]) -> dict[str, TensorEntry]:
    """The tensors of several files. Raises UserError if one is not whole, or two have a tensor of the same name."""
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                reason = f"has {name}, as {entries[name].file} does; a tensor must be in one file alone"
                raise UserError(str(file), hint=reason)
            entries[name] = entry
    return entries


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder, as transformers finds them. Raises UserError if it has none."""
    if (folder / "model.safetensors").is_file():  # an index beside it is stale
        return [folder / "model.safetensors"]
    index = folder / INDEX
    if index.is_file():
        try:
            return sorted({folder / file for file in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(str(index), f"{type(error).__name__}: {error}", "an index of safetensors") from None
    found = sorted(path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    allowed = "a folder with model.safetensors or its index"
    raise UserError(str(folder), ", ".join(found[:5]) or "no weights", allowed, "save_pretrained writes them")


def write_file(file: Path, tensors: TensorSpecs, pieces: Callable[[str], Pieces]) -> dict[str, str]:
    """Write a file of these tensors; returns their `hash_pieces`, {name: hash}, in the order of the file.

    `pieces(name)` yields a tensor's raw elements in row-major order. Wide dtypes come first, which aligns all tensors.
    """
    names = sorted(tensors, key=lambda name: (-SIZES[tensors[name][0]], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape = tensors[name]
        start, end = end, end + math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "xb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        hashes = {name: hash_pieces(pieces(name), stream.write) for name in names}
        assert stream.tell() == 8 + len(text) + end
    return hashes


def check_file(file: Path, hashes: Mapping[str, str]) -> str:
    """Read back a file that `write_file` wrote; returns its sha256. Raises ConversionError if it holds other bytes."""
    entries = read_header(file)
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        digest.update(stream.read(min(entry.start for entry in entries.values())))  # the header
    for name, expected in hashes.items():
        if hash_pieces(entries[name].pieces(), digest.update) != expected:
            raise ConversionError(f"{file}: {name} reads back as other bytes than were written")
    return digest.hexdigest()


def hash_pieces(pieces: Pieces, also: Callable[[memoryview], object] = lambda view: None) -> str:
    """The xxh3_128, in hexadecimal, of a tensor's bytes; `also` is called with each piece of them."""
    digest = xxhash.xxh3_128()
    for _, block in pieces:
        digest.update(view := as_bytes(block))
        also(view)
    return digest.hexdigest()


def group_by_bytes(items: Iterable[T], nbytes: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Items for one file each, of at most `limit` bytes unless a single one has more."""
    group: list[T] = []
    size = 0
    for item in items:
        if group and size + nbytes(item) > limit:
            yield group
            group, size = [], 0
        group.append(item)
        size += nbytes(item)
    yield group
