"""safetensors files, written and read a few MiB at a time: a length, a JSON header, then the tensors' bytes."""

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flame.checkpoint.dtypes import CODES, NAMES, READ_BYTES, SIZES, as_bytes
from flame.checkpoint.structure import ConversionError
from flame.errors import UserError

HEADER_BYTES = 100 << 20  # what the safetensors library reads at most


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file; dtype is torch's name for it, `start` the place of its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]


def lay_out(file: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, Entry]]:
    """The header of a file of these tensors, {name: (dtype, shape)}, and where each will be.

    Wide elements come first, so that every tensor is aligned.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    entries: dict[str, Entry] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-SIZES[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        entries[name] = Entry(dtype, shape, file, end)
        offsets = [end, end := end + entries[name].nbytes]
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    placed = {name: Entry(e.dtype, e.shape, file, begin + e.start) for name, e in entries.items()}
    return struct.pack("<Q", len(text)) + text, placed


def read_header(file: Path) -> dict[str, Entry]:
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
                entry = Entry(NAMES[field["dtype"]], tuple(field["shape"]), file, 8 + length + start)
                if start < 0 or stop - start != entry.nbytes or entry.start + entry.nbytes > size:
                    raise ValueError(f"{name} has bytes {start} to {stop} of a file of {size}")
                entries[name] = entry
        return entries
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{file}: not a whole safetensors file ({type(error).__name__}: {error})") from None


def read_headers(files: Iterable[Path], flag: str = "--model") -> dict[str, Entry]:
    """The tensors of several files, which the flag named. Raises UserError."""
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise UserError(f"{flag}: {name} is in {entries[name].file} and in {file}")
            entries[name] = entry
    return entries


def find_files(folder: Path, flag: str = "--model") -> list[Path]:
    """The safetensors files of a Hugging Face folder, as transformers finds them. Raises UserError, of a flag."""
    if (folder / "model.safetensors").is_file():  # an index beside it is one that was left behind
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            return sorted({folder / file for file in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not an index of safetensors ({type(error).__name__}: {error})") from None
    found = sorted(path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    raise UserError(
        f"{flag} {folder}: found {', '.join(found[:5]) or 'no weights'}, must hold model.safetensors or its index "
        "(save_pretrained of transformers writes them)"
    )


def write_file(
    file: Path, header: bytes, entries: Mapping[str, Entry], blocks: Callable[[str], Iterable[np.ndarray]]
) -> dict[str, int]:
    """Write a file that `lay_out` described; returns {name: checksum}.

    `blocks(name)` gives a tensor's raw elements in row-major order.
    """
    checksums = {}
    with open(file, "xb") as stream:
        stream.write(header)
        for name, entry in entries.items():
            assert stream.tell() == entry.start
            checksums[name] = 0
            for block in blocks(name):
                view = as_bytes(block)
                stream.write(view)
                checksums[name] = zlib.crc32(view, checksums[name])
    return checksums


def check_file(file: Path, header: bytes, entries: Mapping[str, Entry], checksums: Mapping[str, int]) -> str:
    """Read a file that `write_file` wrote; returns its sha256. Raises ConversionError if it holds other bytes."""
    digest = hashlib.sha256(header)
    for name, entry in entries.items():
        checksum = 0
        for view in read_bytes(entry):
            digest.update(view)
            checksum = zlib.crc32(view, checksum)
        if checksum != checksums[name]:
            raise ConversionError(f"{file}: {name} reads back as other bytes than were written")
    return digest.hexdigest()


def read_bytes(entry: Entry) -> Iterator[memoryview]:
    """A tensor's bytes, READ_BYTES at a time; a piece is valid until the next. Raises UserError if they end early."""
    buffer = memoryview(bytearray(min(READ_BYTES, entry.nbytes)))
    left = entry.nbytes
    with open(entry.file, "rb", buffering=0) as stream:
        stream.seek(entry.start)
        while left:
            if not (count := stream.readinto(buffer[:left])):
                raise UserError(f"{entry.file}: ended while it was read")
            yield buffer[:count]
            left -= count
