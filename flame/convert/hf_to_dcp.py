"""Hugging Face weights for DCP: a reader that `dcp.load` takes, and a conversion to a checkpoint, piece by piece."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
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
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.futures import Future

from flame.checkpoint.dtypes import Box, slices, split_box
from flame.checkpoint.structure import ConversionError
from flame.checkpoint.writer import Writer
from flame.convert.dcp_file import read_tensors
from flame.convert.hf_weights import Weights
from flame.convert.safetensors_file import TensorEntry, group_by_bytes, hash_tensor

MEAN_ELEMENTS = 1 << 20  # of rows that are summed at a time
PIECE_BYTES = 64 << 20  # of a chunk and of a file: the writer keeps all tensors of the file that it writes in memory


@dataclass(frozen=True)
class ChunkSource:
    """What a chunk of a model's tensor is read from: an entry's elements or, if `is_mean`, the mean of its rows.

    With `heads` the entry's rows are in another order; see flame.checkpoint.structure.PublishedTensor.
    """

    entry: TensorEntry
    is_mean: bool = False
    heads: int = 0

    def read(self, box: Box) -> torch.Tensor:
        """A box of the chunk. Raises UserError if the file cannot be read."""
        if self.is_mean:
            (start, stop), *inner = box
            return _mean_row(self.entry)[slices(tuple(inner))].expand(stop - start, *[b - a for a, b in inner])
        if not self.heads:
            return self.entry.read(box)
        # Its even rows are the first half of each head of the entry, its odd rows the second; heads are read whole.
        (start, stop), *inner = box
        size = self.entry.shape[0] // self.heads
        first, last = start // size, -(-stop // size)
        rows = self.entry.read(((first * size, last * size), *inner))
        rows = rows.unflatten(0, (last - first, 2, -1)).transpose(1, 2).flatten(0, 2)
        return rows[start - first * size : stop - first * size]


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
            tensors[name] = TensorStorageMetadata(TensorProperties(getattr(torch, dtype)), torch.Size(shape), [])
        for entry, published in self.weights.placed():
            start = published.start
            sizes = (1,) * (len(start) - len(entry.shape)) + entry.shape  # in the dimensions of the model's tensor
            chunks = [(start, sizes, ChunkSource(replace(entry, shape=sizes), heads=published.heads))]
            if published.shape != entry.shape:
                rest = (published.shape[0] - sizes[0], *sizes[1:])
                chunks.append(((sizes[0], *start[1:]), rest, ChunkSource(entry, is_mean=True)))
            tensor = tensors[published.tensor]
            tensor.properties.dtype = getattr(torch, entry.dtype)
            for offsets, extent, source in chunks:
                tensor.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(extent)))
                sources[MetadataIndex(published.tensor, torch.Size(offsets))] = source
        return Metadata(tensors, storage_data=sources, storage_meta=StorageMeta(load_id=self.load_id))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            target = planner.resolve_tensor(item).detach()
            box = tuple((a, a + n) for a, n in zip(item.storage_offsets, item.lengths, strict=True))
            for piece in split_box(box, PIECE_BYTES // target.itemsize):
                inside = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(piece, box, strict=True))
                target[inside].copy_(self.storage_data[item.storage_index].read(piece))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _mean_row(entry: TensorEntry) -> torch.Tensor:
    """The mean of an entry's rows, in float64."""
    total = torch.zeros(entry.shape[1:], dtype=torch.float64)
    for (start, stop), *_ in split_box(((0, entry.shape[0]),), max(1, MEAN_ELEMENTS // math.prod(entry.shape[1:]))):
        total += entry.read(((start, stop), *((0, size) for size in entry.shape[1:]))).double().sum(0)
    return total / entry.shape[0]


def convert_hf_to_dcp(
    weights: Weights,
    folder: Path,
    *,
    advance: Callable[[int], None] = lambda count: None,
    piece_bytes: int = PIECE_BYTES,
) -> None:
    """Write weights to `folder` as a DCP checkpoint, under the model's names and shapes; dtypes are kept.

    A published tensor becomes one chunk, a large one several. `advance` is called with the bytes that were written.
    Raises ConversionError if the checkpoint reads back as other bytes.
    """
    metadata = WeightReader(weights).read_metadata()
    items: list[WriteItem] = []
    sources: dict[MetadataIndex, tuple[ChunkSource, Box]] = {}
    tensors: dict[str, Any] = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        for chunk in tensor.chunks:
            source = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            whole = tuple((0, size) for size in chunk.sizes)
            for box in split_box(whole, max(1, piece_bytes // tensor.properties.dtype.itemsize)):
                offsets = torch.Size(low + start for low, (start, _) in zip(chunk.offsets, box, strict=True))
                piece = ChunkStorageMetadata(offsets, torch.Size(stop - start for start, stop in box))
                data, index = TensorWriteData(piece, tensor.properties, tensor.size), MetadataIndex(name, offsets)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
                sources[index] = source, box
                tensors.setdefault(name, replace(tensor, chunks=[])).chunks.append(piece)

    def resolve_data(item: WriteItem) -> torch.Tensor:
        assert item.tensor_data is not None
        source, box = sources[item.index]
        tensor = source.read(box).to(item.tensor_data.properties.dtype, copy=True)  # not a view of the mapped file
        advance(tensor.nbytes)
        return tensor

    planner: Any = SimpleNamespace(resolve_data=resolve_data)  # all that DCP's writer asks for
    writer = Writer(folder, {"step": 0, "tokens": 0, "resumable": False, "ranks": 1}, overwrite=False)
    writer.set_up_storage_writer(True)
    plans = [SavePlan(file) for file in group_by_bytes(items, _nbytes, piece_bytes)]
    plans = [writer.prepare_local_plan(plan) for plan in writer.prepare_global_plan(plans)]  # a plan is a rank's file
    results = [writer.write_data(plan, planner).wait() for plan in plans]
    writer.finish(Metadata(tensors, planner_data={name: (name,) for name in tensors}), results)
    _read_back(weights, folder)


def _nbytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _read_back(weights: Weights, folder: Path) -> None:
    tensors = read_tensors(folder)
    for entry, published in weights.placed():
        assert not published.heads, "only models of torchtitan have their rows in another order"
        tensor = tensors[published.tensor]
        found, expected = hash_tensor(tensor.read(published.box)), hash_tensor(entry.read())
        if (tensor.dtype, found) != (entry.dtype, expected):
            raise ConversionError(f"{folder}: {tensor.name} reads back as other bytes than {entry.file} holds")
