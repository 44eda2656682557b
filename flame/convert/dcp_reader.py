"""Safetensors files as a checkpoint that DCP loads: each rank reads of each tensor the part it holds, by pieces."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from flame.checkpoint.dtypes import READ_BYTES, SIZES, Box, as_bytes, read_box, split_box
from flame.convert.hf_weights import Weights
from flame.convert.safetensors_file import Entry
from flame.errors import UserError


@dataclass(frozen=True)
class _Place:
    """What a chunk of a tensor is made of: an entry's elements, or in every row the mean of its rows.

    With `heads` the entry's rows are in another order; see flame.checkpoint.structure.PublishedTensor.
    """

    entry: Entry
    is_mean: bool = False
    heads: int = 0


class WeightReader(FileSystemReader):
    """A reader for `dcp.load` of a model's state dict, in whatever layout. Raises UserError if a file ends early.

    Rows of a vocabulary that the weights do not have are the mean of those they have, the same in every layout.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights.folder)
        self.weights = weights

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        structure = self.weights.structure
        tensors: dict[str, Any] = {}
        for name, (dtype, shape) in structure.tensors.items():
            properties = TensorProperties(dtype=getattr(torch, dtype))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(shape), [])
        places: dict[MetadataIndex, _Place] = {}

        def add(name: str, start: tuple[int, ...], sizes: tuple[int, ...], place: _Place) -> None:
            chunk = ChunkStorageMetadata(torch.Size(start), torch.Size(sizes))
            tensors[name].chunks.append(chunk)
            places[MetadataIndex(name, chunk.offsets)] = place

        for published, entry in self.weights.entries.items():
            part = structure.published_tensor(published)
            sizes = (1,) * (len(part.start) - len(entry.shape)) + entry.shape  # a box of the model's own dimensions
            add(part.tensor, part.start, sizes, _Place(replace(entry, shape=sizes), heads=part.heads))
            if part.shape != entry.shape:
                absent = (part.shape[0] - sizes[0], *sizes[1:])
                add(part.tensor, (sizes[0], *part.start[1:]), absent, _Place(entry, is_mean=True))
        return Metadata(tensors, storage_data=places, storage_meta=StorageMeta(load_id=self.load_id))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            place = self.storage_data[item.storage_index]
            box = tuple((a, a + n) for a, n in zip(item.storage_offsets, item.lengths, strict=True))
            target = planner.resolve_tensor(item).detach()
            if place.is_mean:
                target.copy_(_mean_row(place.entry)[tuple(slice(*each) for each in box[1:])].expand_as(target))
            else:
                for piece, tensor in _read_heads(place, box) if place.heads else _read(place.entry, box):
                    target[_within(piece, box)].copy_(tensor)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _within(piece: Box, box: Box) -> tuple[slice, ...]:
    return tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(piece, box, strict=True))


def _read(entry: Entry, box: Box) -> Iterator[tuple[Box, torch.Tensor]]:
    """The pieces of a box of an entry, at most READ_BYTES each, with their places in the entry."""
    if any(start == stop for start, stop in box):
        return
    for piece in split_box(box, READ_BYTES // SIZES[entry.dtype]):
        try:
            block = read_box(entry.file, entry.start, entry.dtype, entry.shape, piece)
        except EOFError:
            raise UserError(f"{entry.file}: ended while it was read") from None
        yield piece, torch.frombuffer(as_bytes(block), dtype=getattr(torch, entry.dtype)).view(block.shape)


def _read_heads(place: _Place, box: Box) -> Iterator[tuple[Box, torch.Tensor]]:
    """The pieces of a box of a tensor whose even rows are the first half of each head of an entry, its odd the second.

    Heads of which some rows are wanted are read whole.
    """
    (start, stop), *inner = box
    size = place.entry.shape[0] // place.heads
    for head in range(start // size * size, stop, size):
        low, high = max(start, head), min(stop, head + size)
        rows = torch.cat([tensor for _, tensor in _read(place.entry, ((head, head + size), *inner))])
        yield ((low, high), *inner), rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)[low - head : high - head]


def _mean_row(entry: Entry) -> torch.Tensor:
    """The mean of an entry's rows, in float64."""
    total = torch.zeros(entry.shape[1:], dtype=torch.float64)
    for piece, tensor in _read(entry, tuple((0, size) for size in entry.shape)):
        total[tuple(slice(*each) for each in piece[1:])] += tensor.double().sum(0)
    return total / entry.shape[0]
