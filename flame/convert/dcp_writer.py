"""Hugging Face weights to a DCP checkpoint of the model alone, by DCP's own writer, piece by piece, and read back."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from flame.checkpoint.dtypes import Box, split_box
from flame.checkpoint.structure import ConversionError
from flame.checkpoint.writer import Writer
from flame.convert.dcp_file import read_tensors
from flame.convert.hf_weights import Weights
from flame.convert.safetensors_file import group_by_bytes, hash_blocks
from flame.convert.weight_reader import ChunkSource, WeightReader

PIECE_BYTES = 64 << 20  # of a chunk and of a file: the writer keeps all tensors of the file that it writes in memory


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
    writer = Writer(folder, {"step": 0, "tokens": 0, "resumable": False, "ranks": 1}, overwrite=False)
    writer.set_up_storage_writer(True)
    plans = [SavePlan(file) for file in group_by_bytes(items, _nbytes, piece_bytes)]
    plans = [writer.prepare_local_plan(plan) for plan in writer.prepare_global_plan(plans)]  # a plan is a rank's file
    planner: Any = _Planner(sources, advance)
    results = [writer.write_data(plan, planner).wait() for plan in plans]
    writer.finish(Metadata(tensors, planner_data={name: (name,) for name in tensors}), results)
    _read_back(weights, folder)


def _nbytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


class _Planner:
    """What DCP's writer asks for the content of an item."""

    def __init__(
        self, sources: Mapping[MetadataIndex, tuple[ChunkSource, Box]], advance: Callable[[int], None]
    ) -> None:
        self.sources, self.advance = sources, advance

    def resolve_data(self, item: WriteItem) -> torch.Tensor:
        assert item.tensor_data is not None
        source, box = self.sources[item.index]
        tensor = torch.empty(item.tensor_data.chunk.sizes, dtype=item.tensor_data.properties.dtype)
        source.read(box, tensor)
        self.advance(tensor.nbytes)
        return tensor


def _read_back(weights: Weights, folder: Path) -> None:
    tensors = read_tensors(folder)
    for entry, published in weights.placed():
        assert not published.heads, "only models of torchtitan have their rows in another order"
        tensor = tensors[published.tensor]
        expected, found = (
            hash_blocks(block for _, block in each) for each in (entry.pieces(), tensor.pieces(published.box))
        )
        if (tensor.dtype, found) != (entry.dtype, expected):
            raise ConversionError(f"{folder}: {tensor.name} reads back as other bytes than {entry.file} holds")
