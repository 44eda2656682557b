"""Hugging Face weights as a checkpoint that DCP loads: each rank reads its part of each tensor, in pieces."""

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

from flame.checkpoint.dtypes import Box, as_bytes
from flame.convert.hf_weights import Weights
from flame.convert.safetensors_file import TensorEntry


@dataclass(frozen=True)
class ChunkSource:
    """What a chunk of a model's tensor is read from: an entry's elements or, if `is_mean`, the mean of its rows.

    With `heads` the entry's rows are in another order; see flame.checkpoint.structure.PublishedTensor.
    """

    entry: TensorEntry
    is_mean: bool = False
    heads: int = 0

    def read(self, box: Box, target: torch.Tensor) -> None:
        """Copy a box of the chunk to a tensor of its shape, a few MiB at a time. Raises UserError if the file ends."""
        if self.is_mean:
            target.copy_(_mean_row(self.entry)[tuple(slice(*each) for each in box[1:])].expand_as(target))
            return
        for piece, tensor in self._read_heads(box) if self.heads else _read(self.entry, box):
            inside = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(piece, box, strict=True))
            target[inside].copy_(tensor)

    def _read_heads(self, box: Box) -> Iterator[tuple[Box, torch.Tensor]]:
        """The pieces of a box whose even rows are the first half of each head of the entry, its odd rows the second.

        A head with any row in the box is read whole.
        """
        (start, stop), *inner = box
        size = self.entry.shape[0] // self.heads
        for head in range(start // size * size, stop, size):
            low, high = max(start, head), min(stop, head + size)
            rows = torch.cat([tensor for _, tensor in _read(self.entry, ((head, head + size), *inner))])
            rows = rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
            yield ((low, high), *inner), rows[low - head : high - head]


class WeightReader(FileSystemReader):
    """A reader for `dcp.load` of a model's state dict, in any layout.

    Rows of a vocabulary that the weights do not have are the mean of those they have, the same in every layout.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__("")
        self.weights = weights

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The model's tensors as chunks, each with its ChunkSource: a published tensor, or the rows that it lacks."""
        tensors: dict[str, Any] = {}
        sources: dict[MetadataIndex, ChunkSource] = {}
        for name, (dtype, shape) in self.weights.structure.tensors.items():
            properties = TensorProperties(dtype=getattr(torch, dtype))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(shape), [])

        def add(name: str, start: tuple[int, ...], sizes: tuple[int, ...], source: ChunkSource) -> None:
            chunk = ChunkStorageMetadata(torch.Size(start), torch.Size(sizes))
            tensors[name].chunks.append(chunk)
            tensors[name].properties.dtype = getattr(torch, source.entry.dtype)
            sources[MetadataIndex(name, chunk.offsets)] = source

        for entry, published in self.weights.placed():
            sizes = (1,) * (len(published.start) - len(entry.shape)) + entry.shape  # in the dimensions of the model's
            add(
                published.tensor,
                published.start,
                sizes,
                ChunkSource(replace(entry, shape=sizes), heads=published.heads),
            )
            if published.shape != entry.shape:
                missing = (published.shape[0] - sizes[0], *sizes[1:])
                add(published.tensor, (sizes[0], *published.start[1:]), missing, ChunkSource(entry, is_mean=True))
        return Metadata(tensors, storage_data=sources, storage_meta=StorageMeta(load_id=self.load_id))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            target = planner.resolve_tensor(item).detach()
            box = tuple((a, a + n) for a, n in zip(item.storage_offsets, item.lengths, strict=True))
            self.storage_data[item.storage_index].read(box, target)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _read(entry: TensorEntry, box: Box | None = None) -> Iterator[tuple[Box, torch.Tensor]]:
    for piece, block in entry.pieces(box):
        yield piece, torch.frombuffer(as_bytes(block), dtype=getattr(torch, entry.dtype)).view(block.shape)


def _mean_row(entry: TensorEntry) -> torch.Tensor:
    """The mean of an entry's rows, in float64."""
    total = torch.zeros(entry.shape[1:], dtype=torch.float64)
    for piece, tensor in _read(entry):
        total[tuple(slice(*each) for each in piece[1:])] += tensor.double().sum(0)
    return total / entry.shape[0]
