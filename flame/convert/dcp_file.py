"""Reads the model in a DCP checkpoint without torch, a few MiB at a time, from any number of ranks in any layout.

A chunk of a tensor is a file of `torch.save` inside a rank's file: an uncompressed zip, whose members are the tensor's
memory and a small pickle with its strides.
"""

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from flame.checkpoint.commit import report_unreadable
from flame.checkpoint.dtypes import CODES, READ_BYTES, SIZES, Box, as_bytes, raw_dtype, read_box, split_box
from flame.checkpoint.safe_pickle import read_pickle
from flame.errors import UserError

_NOT_MODEL = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.")  # torchtitan's; the model has no prefix


class CorruptedError(ValueError):
    """A checkpoint whose bytes are not what its own metadata and checksums say."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the bytes `start` to `start + length` of `file` that torch.save wrote of it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int

    def overlap(self, box: Box) -> Box | None:
        """What the chunk has of a box of the tensor."""
        inside = tuple(
            (max(start, low), min(stop, low + size))
            for (start, stop), low, size in zip(box, self.offsets, self.sizes, strict=True)
        )
        return inside if all(start < stop for start, stop in inside) else None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint and where its chunks are; dtype is torch's name for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def box(self) -> Box:
        """All of it."""
        return tuple((0, size) for size in self.shape)

    def pieces(self, box: Box | None = None, nbytes: int = READ_BYTES) -> Iterator[tuple[Box, np.ndarray]]:
        """The raw elements of a box, or of all, at most `nbytes` at a time in row-major order, each with its own box.

        Raises CorruptedError if the chunks do not fill the tensor, a file is cut short, or a checksum is wrong; those
        of a box that is not the whole are left to `check`.
        """
        box = self.box if box is None else box
        readers = [ChunkReader(chunk, self) for chunk in self.chunks if chunk.overlap(box) is not None]
        for piece in split_box(box, max(1, nbytes // SIZES[self.dtype])):
            yield piece, self._assemble(readers, piece)
        for reader in readers if box == self.box else ():
            reader.check()

    def check(self) -> None:
        """Read all chunks. Raises CorruptedError if one is not what torch wrote."""
        for chunk in self.chunks:
            ChunkReader(chunk, self).check()

    def _assemble(self, readers: "list[ChunkReader]", box: Box) -> np.ndarray:
        block, filled = np.empty([stop - start for start, stop in box], raw_dtype(self.dtype)), 0
        for reader in readers:
            if (inside := reader.chunk.overlap(box)) is None:
                continue
            part = reader.read(inside)
            if part.shape == block.shape:
                return part
            block[tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(inside, box, strict=True))] = part
            filled += part.size
        if filled != block.size:
            found = f"{filled} of its {block.size} elements in {box}"
            raise CorruptedError(f"{self.name}: the checkpoint's chunks hold {found}")
        return block


def read_tensors(checkpoint: Path) -> dict[str, StoredTensor]:
    """The model's tensors, sorted by name. Raises UserError if this is not a complete checkpoint or holds no model."""
    path = checkpoint / ".metadata"
    if not path.is_file():
        raise UserError(str(checkpoint), "no .metadata", "a complete DCP checkpoint")
    with report_unreadable(path):
        data = path.read_bytes()
    try:
        fields = read_pickle(data).state
        places = {
            (key.state["fqn"], key.state.get("offset")): place.state for key, place in fields["storage_data"].items()
        }
        tensors = {
            name: _tensor(checkpoint, name, entry.state, places)
            for name, entry in sorted(fields["state_dict_metadata"].items())
            if not name.startswith(_NOT_MODEL) and entry.state  # bytes, which are not a tensor, have no state
        }
    except UserError:
        raise
    except Exception as error:  # a foreign or corrupted pickle fails in any way
        raise UserError(str(path), f"{type(error).__name__}: {error}", "the metadata of a DCP checkpoint") from None
    if not tensors:
        raise UserError(str(checkpoint), "no model", "a checkpoint with one")
    return tensors


def _tensor(checkpoint: Path, name: str, entry: dict[str, Any], places: dict[Any, dict[str, Any]]) -> StoredTensor:
    dtype, chunks = entry["properties"].state[0], []
    if dtype not in CODES:
        raise UserError(f"{checkpoint}: {name}", f"dtype {dtype}", f"one of {', '.join(CODES)}")
    for chunk in entry["chunks"]:
        offsets, sizes = chunk.state["offsets"], chunk.state["sizes"]
        if 0 in sizes:  # the share of a rank that has none
            continue
        place = places[name, offsets]
        if transforms := place.get("transform_descriptors"):
            raise UserError(f"{checkpoint}: {name}", f"stored by {transforms}", "uncompressed")
        chunks.append(Chunk(offsets, sizes, checkpoint / place["relative_path"], place["offset"], place["length"]))
    return StoredTensor(name, dtype, entry["size"], tuple(chunks))


class ChunkReader:
    """Reads one chunk of a tensor, a box at a time.

    Raises CorruptedError, and UserError for a file that cannot be read, as that may be intact.
    """

    def __init__(self, chunk: Chunk, tensor: StoredTensor) -> None:
        self.chunk, self.name, self.dtype = chunk, tensor.name, tensor.dtype
        self.crc, self.count = 0, 0
        try:
            with _ChunkFile(chunk) as file, zipfile.ZipFile(file) as archive:
                folder = archive.namelist()[0].split("/")[0]
                key, first, sizes, self.strides = read_pickle(archive.read(f"{folder}/data.pkl"))
                memory = archive.getinfo(f"{folder}/data/{key}")
                file.seek(memory.header_offset)
                name_length, extra_length = struct.unpack_from("<26x2H", file.read(30) or b"")
        except UserError:
            raise
        except FileNotFoundError:
            raise self._corrupted("no file") from None
        except (zipfile.BadZipFile, KeyError, ValueError, TypeError, struct.error, pickle.UnpicklingError) as error:
            raise self._corrupted(f"no file of torch.save ({type(error).__name__}: {error})") from None
        if sizes != chunk.sizes:
            raise self._corrupted(f"a tensor of shape {sizes}, must be {chunk.sizes}")
        self.memory = chunk.start + memory.header_offset + 30 + name_length + extra_length
        self.nbytes, self.expected = memory.file_size, memory.CRC
        self.start = self.memory + first * SIZES[self.dtype]
        steps = [prod(sizes[i + 1 :]) for i in range(len(sizes))]
        self.row_major = all(n == 1 or a == b for n, a, b in zip(sizes, self.strides, steps, strict=True))

    def read(self, box: Box) -> np.ndarray:
        """The raw elements of a box of the tensor that lies in this chunk; boxes come in row-major order."""
        local = [(start - low, stop - low) for (start, stop), low in zip(box, self.chunk.offsets, strict=True)]
        if not self.row_major:
            return np.ascontiguousarray(self._map()[tuple(slice(*each) for each in local)])
        try:
            block = read_box(self.chunk.file, self.start, self.dtype, self.chunk.sizes, local)
        except EOFError:
            raise self._corrupted("the end of the file") from None
        self.crc, self.count = zlib.crc32(as_bytes(block), self.crc), self.count + block.size
        return block

    def check(self) -> None:
        """Raises CorruptedError if the chunk is not what torch wrote; it is read for that, unless all of it was."""
        crc = self.crc
        if self.count * SIZES[self.dtype] != self.nbytes:
            crc = 0
            with report_unreadable(self.chunk.file), open(self.chunk.file, "rb") as stream:
                stream.seek(self.memory)
                for start in range(0, self.nbytes, READ_BYTES):
                    crc = zlib.crc32(stream.read(min(READ_BYTES, self.nbytes - start)), crc)
        if crc != self.expected:
            raise self._corrupted(f"checksum {crc:08x}, must be {self.expected:08x}")

    def _map(self) -> np.ndarray:
        """The chunk by its strides: torch saves the memory of a transposed tensor as it is."""
        reach = 1 + sum((size - 1) * stride for size, stride in zip(self.chunk.sizes, self.strides, strict=True))
        with report_unreadable(self.chunk.file):
            memory = np.memmap(self.chunk.file, raw_dtype(self.dtype), "r", self.start, (reach,))
        strides = [stride * memory.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(memory, self.chunk.sizes, strides)

    def _corrupted(self, found: str) -> CorruptedError:
        return CorruptedError(f"{self.chunk.file}: found {found} where {self.name} should be")


class _ChunkFile(io.RawIOBase):
    """A chunk's bytes as a file, which is how zipfile reads them. Raises UserError, which zipfile passes on."""

    def __init__(self, chunk: Chunk) -> None:
        with report_unreadable(chunk.file):
            self.file, self.chunk, self.position = chunk.file.open("rb"), chunk, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.chunk.length)[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        with report_unreadable(self.chunk.file):
            self.file.seek(self.chunk.start + self.position)
            data = self.file.read(min(len(buffer), max(0, self.chunk.length - self.position)))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()
