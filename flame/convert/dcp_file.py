"""Reads the model in a DCP checkpoint, a tensor or a box of it at a time, from any number of ranks in any layout.

A chunk of a tensor is a file of `torch.save` inside a rank's file. Nothing in a checkpoint is unpickled but what
`parse_metadata` and torch's `weights_only` allow.
"""

import io
import pickle
import stat
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch

from flame.checkpoint.commit import read_metadata, report_unreadable
from flame.checkpoint.dtypes import CODES, SIZES, Box, slices
from flame.checkpoint.metadata import Place, TensorInfo
from flame.config.files import regular
from flame.errors import UserError, first_line

_NOT_MODEL = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.")  # torchtitan's; the model has no prefix


class CorruptedError(ValueError):
    """A checkpoint whose bytes are not what its own metadata and checksums say."""


@dataclass(frozen=True)
class Chunk:
    """A box of the tensor `name`, and the bytes `start` to `start + length` of `file` that torch.save wrote of it."""

    name: str
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

    def modified(self) -> int:
        """When the file was last modified, in nanoseconds. Raises CorruptedError if it cannot hold the chunk."""
        try:
            status = self.file.stat()
        except FileNotFoundError:
            raise self.corrupted("no file") from None
        if stat.S_ISREG(status.st_mode) and 0 < status.st_size < self.start + self.length:
            raise self.corrupted("no file of torch.save (the file ends before it)")
        return status.st_mtime_ns

    def corrupted(self, found: str) -> CorruptedError:
        return CorruptedError(f"{self.file}: found {found} where {self.name} should be")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint and where its chunks are; dtype is torch's name for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def read(self, box: Box | None = None) -> torch.Tensor:
        """The tensor or a box of it, in memory; the chunks that it lies in are read one after the other.

        Raises CorruptedError if they do not fill it, a file is cut short, or a checksum is wrong, and UserError if a
        file cannot be read, as that may be intact.
        """
        box = tuple((0, size) for size in self.shape) if box is None else box
        shape = [stop - start for start, stop in box]
        parts = [(chunk, inside) for chunk in self.chunks if (inside := chunk.overlap(box)) is not None]
        filled = sum(prod(stop - start for start, stop in inside) for _, inside in parts)
        if filled != prod(shape):
            raise CorruptedError(f"{self.name}: the chunks hold {filled} of its {prod(shape)} elements in {box}")
        for chunk, _ in parts:  # before there is memory for what they say they hold
            chunk.modified()
            if prod(chunk.sizes) * SIZES[self.dtype] > chunk.length:
                raise chunk.corrupted(f"{chunk.length:,} bytes for {chunk.sizes} of {self.dtype}")
        result = torch.empty(shape, dtype=getattr(torch, self.dtype))
        for chunk, inside in parts:
            local = [(a - low, b - low) for (a, b), low in zip(inside, chunk.offsets, strict=True)]
            part = _read_chunk(chunk, chunk.modified())[slices(tuple(local))]
            result[tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(inside, box, strict=True))] = part
        return result


def read_tensors(checkpoint: Path) -> dict[str, StoredTensor]:
    """The model's tensors, sorted by name. Raises UserError if this is not a complete checkpoint or holds no model."""
    metadata = read_metadata(checkpoint)
    tensors = {
        name: _tensor(checkpoint, name, info, metadata.places)
        for name, info in sorted(metadata.tensors.items())
        if info and not name.startswith(_NOT_MODEL)
    }
    if not tensors:
        raise UserError(str(checkpoint), "no model", "a checkpoint with one")
    return tensors


def _tensor(checkpoint: Path, name: str, info: TensorInfo, places: Mapping[Any, Place]) -> StoredTensor:
    if info.dtype not in CODES:
        raise UserError(f"{checkpoint}: {name}", f"dtype {info.dtype}", f"one of {', '.join(CODES)}")
    chunks = []
    for offsets, sizes in info.chunks:
        if 0 in sizes:  # the share of a rank that has none
            continue
        if (place := places.get((name, offsets))) is None or not len(offsets) == len(sizes) == len(info.shape):
            found = f"a chunk of sizes {sizes} at {offsets} of shape {info.shape}"
            raise UserError(f"{checkpoint}: {name}", found, "a chunk of the tensor, with a place in a file")
        chunks.append(Chunk(name, offsets, sizes, checkpoint / place.file, place.start, place.length))
    return StoredTensor(name, info.dtype, info.shape, tuple(chunks))


@lru_cache(maxsize=1)  # the boxes of a tensor, such as experts, are read one after the other
def _read_chunk(chunk: Chunk, modified: int) -> torch.Tensor:
    """A chunk, whose checksums are verified; modified: of its file, so that the cache is not stale."""
    try:
        with report_unreadable(chunk.file), open(chunk.file, "rb", opener=regular) as stream:
            stream.seek(chunk.start)
            data = stream.read(chunk.length)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if member := archive.testzip():
                raise chunk.corrupted(f"a wrong checksum of {member}")
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise chunk.corrupted(f"no file of torch.save ({first_line(error)})") from None
    if not torch.is_tensor(tensor) or tuple(tensor.shape) != chunk.sizes:
        raise chunk.corrupted(f"a {type(tensor).__name__} of shape {tuple(getattr(tensor, 'shape', ()))}")
    return tensor
