"""Reads the model in a DCP checkpoint without torch, a few MiB at a time, from any number of ranks in any layout."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flame.checkpoint.dtypes import CODES, READ_BYTES, SIZES, Box, boxes, raw
from flame.checkpoint.safe_pickle import read_pickle
from flame.convert.chunk import Chunk, ChunkReader, DamagedError
from flame.errors import UserError

_NOT_MODEL = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.")  # torchtitan's; the model has no prefix


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint and where its chunks are; dtype is torch's name for it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def box(self) -> Box:
        """All of it."""
        return tuple((0, size) for size in self.shape)


def read_tensors(checkpoint: Path) -> dict[str, StoredTensor]:
    """The model's tensors, sorted by name. Raises UserError if this is no complete checkpoint or holds no model."""
    path = checkpoint / ".metadata"
    if not path.is_file():
        raise UserError(f"{checkpoint}: found no .metadata, so this is not a complete DCP checkpoint")
    try:
        fields = read_pickle(path.read_bytes()).state
        places = {
            (key.state["fqn"], key.state.get("offset")): place.state for key, place in fields["storage_data"].items()
        }
        tensors = {
            name: _tensor(checkpoint, name, entry.state, places)
            for name, entry in sorted(fields["state_dict_metadata"].items())
            if not name.startswith(_NOT_MODEL) and entry.state  # bytes, which are no tensor, have no state
        }
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a foreign or damaged pickle fails in whatever way it likes
        raise UserError(f"{path}: not the metadata of a DCP checkpoint ({type(error).__name__}: {error})") from None
    if not tensors:
        raise UserError(f"{checkpoint} holds no model")
    return tensors


def read_blocks(
    name: str, tensor: StoredTensor, box: Box | None = None, block_bytes: int = READ_BYTES
) -> Iterator[np.ndarray]:
    """A tensor's raw elements, or those of a box of it, in row-major order, at most `block_bytes` at a time.

    Raises DamagedError if the chunks do not fill the tensor, a file is cut short, or a checksum is wrong; those of a
    box that is not the whole are left to `check_tensor`.
    """
    box = box or tensor.box
    readers = [ChunkReader(chunk, name, tensor.dtype) for chunk in tensor.chunks if _overlap(chunk, box) is not None]
    for each in boxes(box, max(1, block_bytes // SIZES[tensor.dtype])):
        yield _assemble(name, tensor, readers, each)
    for reader in readers if box == tensor.box else ():
        reader.check()


def check_tensor(name: str, tensor: StoredTensor) -> None:
    """Read the chunks of a tensor. Raises DamagedError if one is not what torch wrote."""
    for chunk in tensor.chunks:
        ChunkReader(chunk, name, tensor.dtype).check()


def _tensor(checkpoint: Path, name: str, entry: dict[str, Any], places: dict[Any, dict[str, Any]]) -> StoredTensor:
    dtype, chunks = entry["properties"].state[0], []
    if dtype not in CODES:
        raise UserError(f"{checkpoint}: {name} is of type {dtype}, must be one of {', '.join(CODES)}")
    for chunk in entry["chunks"]:
        offsets, sizes = chunk.state["offsets"], chunk.state["sizes"]
        if 0 in sizes:  # the share of a rank that has none
            continue
        place = places[name, offsets]
        if place.get("transform_descriptors"):
            raise UserError(f"{checkpoint}: {name} is stored by {place['transform_descriptors']}, must be uncompressed")
        chunks.append(Chunk(offsets, sizes, checkpoint / place["relative_path"], place["offset"], place["length"]))
    return StoredTensor(dtype, entry["size"], tuple(chunks))


def _assemble(name: str, tensor: StoredTensor, readers: list[ChunkReader], box: Box) -> np.ndarray:
    block, filled = np.empty([stop - start for start, stop in box], raw(tensor.dtype)), 0
    for reader in readers:
        inside = _overlap(reader.chunk, box)
        if inside is None:
            continue
        part = reader.read(inside)
        if part.shape == block.shape:
            return part
        block[tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(inside, box, strict=True))] = part
        filled += part.size
    if filled != block.size:
        raise DamagedError(f"{name}: the chunks of the checkpoint hold {filled} of its {block.size} elements in {box}")
    return block


def _overlap(chunk: Chunk, box: Box) -> Box | None:
    inside = tuple(
        (max(start, low), min(stop, low + size))
        for (start, stop), low, size in zip(box, chunk.offsets, chunk.sizes, strict=True)
    )
    return inside if all(start < stop for start, stop in inside) else None
