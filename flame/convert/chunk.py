"""One chunk of a tensor in a DCP checkpoint: a file of `torch.save` within a file of its rank.

`torch.save` writes an uncompressed zip: the tensor's memory as one member, and a small pickle with its strides.
"""

import io
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flame.checkpoint.dtypes import READ_BYTES, SIZES, Box, as_bytes, is_adjacent, raw, read_box, reading
from flame.checkpoint.safe_pickle import read_pickle
from flame.errors import UserError


class DamagedError(ValueError):
    """A checkpoint whose bytes are not what its own metadata and checksums say."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the bytes `start` to `start + length` of `file` that torch.save wrote of it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


class ChunkReader:
    """Reads one chunk of a tensor called `name`, a box at a time.

    Raises DamagedError, and UserError for a file that cannot be read, which may be whole.
    """

    def __init__(self, chunk: Chunk, name: str, dtype: str) -> None:
        self.chunk, self.name, self.dtype = chunk, name, dtype
        self.crc, self.count = 0, 0
        try:
            with _Range(chunk) as view, zipfile.ZipFile(view) as archive:
                folder = archive.namelist()[0].split("/")[0]
                key, first, sizes, self.strides = read_pickle(archive.read(f"{folder}/data.pkl"))
                memory = archive.getinfo(f"{folder}/data/{key}")
                view.seek(memory.header_offset)
                header = view.read(30)
                assert header is not None
                name_length, extra_length = struct.unpack_from("<26x2H", header)
        except UserError:
            raise
        except FileNotFoundError:
            raise self._damaged("no file") from None
        except (zipfile.BadZipFile, KeyError, ValueError, TypeError, struct.error, pickle.UnpicklingError) as error:
            raise self._damaged(f"no file of torch.save ({type(error).__name__}: {error})") from None
        if sizes != chunk.sizes:
            raise self._damaged(f"a tensor of shape {sizes}, must be {chunk.sizes}")
        self.memory = chunk.start + memory.header_offset + 30 + name_length + extra_length
        self.nbytes, self.expected = memory.file_size, memory.CRC
        self.start = self.memory + first * SIZES[dtype]
        self.row_major = _is_row_major(sizes, self.strides)

    def read(self, box: Box) -> np.ndarray:
        """The raw elements of a box of the tensor that lies in this chunk; boxes come in row-major order."""
        local = [(start - low, stop - low) for (start, stop), low in zip(box, self.chunk.offsets, strict=True)]
        if not (self.row_major and is_adjacent(local, self.chunk.sizes)):
            return np.ascontiguousarray(self._map()[tuple(slice(*each) for each in local)])
        try:
            block = read_box(self.chunk.file, self.start, self.dtype, self.chunk.sizes, local)
        except EOFError:
            raise self._damaged("the end of the file") from None
        self.crc, self.count = zlib.crc32(as_bytes(block), self.crc), self.count + block.size
        return block

    def check(self) -> None:
        """Raises DamagedError if the chunk is not what torch wrote; it is read for that, unless all of it was."""
        crc = self.crc if self.count * SIZES[self.dtype] == self.nbytes else self._read_crc()
        if crc != self.expected:
            raise self._damaged(f"checksum {crc:08x}, must be {self.expected:08x}")

    def _read_crc(self) -> int:
        crc, left = 0, self.nbytes
        with reading(self.chunk.file), open(self.chunk.file, "rb", buffering=0) as stream:
            stream.seek(self.memory)
            while left:
                if not (data := stream.read(min(left, READ_BYTES))):
                    raise self._damaged("the end of the file")
                crc, left = zlib.crc32(data, crc), left - len(data)
        return crc

    def _map(self) -> np.ndarray:
        """The chunk by its strides: torch saves the memory of a transposed tensor as it is."""
        reach = 1 + sum((size - 1) * stride for size, stride in zip(self.chunk.sizes, self.strides, strict=True))
        with reading(self.chunk.file):
            memory = np.memmap(self.chunk.file, raw(self.dtype), "r", self.start, (reach,))
        strides = [stride * memory.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(memory, self.chunk.sizes, strides)

    def _damaged(self, found: str) -> DamagedError:
        return DamagedError(f"{self.chunk.file}: found {found} where {self.name} should be")


def _is_row_major(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


class _Range(io.RawIOBase):
    """A chunk's bytes as a file, which is how zipfile reads them."""

    def __init__(self, chunk: Chunk) -> None:
        with reading(chunk.file):
            self.file, self.chunk, self.position = chunk.file.open("rb"), chunk, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.chunk.length)[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        with reading(self.chunk.file):  # here: zipfile would call it a bad zip
            self.file.seek(self.chunk.start + self.position)
            data = self.file.read(min(len(buffer), max(0, self.chunk.length - self.position)))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()
