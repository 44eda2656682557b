"""Writes tensors of safetensors files as a DCP checkpoint of the model alone, by DCP's own writer, piece by piece."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from flame.checkpoint.dtypes import SIZES, split_box
from flame.checkpoint.structure import PublishedTensor
from flame.checkpoint.writer import Writer
from flame.convert.safetensors_file import Entry

PIECE_BYTES = 64 << 20  # of a chunk and of a file: the writer holds on to all tensors of the file it writes


@dataclass(frozen=True)
class _Piece:
    """A chunk to write, and where its bytes are."""

    item: WriteItem
    chunk: ChunkStorageMetadata
    file: Path
    start: int
    nbytes: int


def write_checkpoint(
    entries: Mapping[str, Entry],
    parts: Mapping[str, PublishedTensor],
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
    *,
    advance: Callable[[int], None] = lambda count: None,
    piece_bytes: int = PIECE_BYTES,
) -> None:
    """Write a DCP checkpoint of the tensors {name: shape} that `parts` of them, found at `entries`, make up.

    A part is a chunk of its tensor, a large one several. To the writer every file is that of one rank.
    """
    pieces = [piece for name, part in parts.items() for piece in _cut(entries[name], part, shapes, piece_bytes)]
    writer = Writer(folder, {"step": 0, "tokens": 0, "resumable": False, "ranks": 1}, overwrite=False)
    writer.set_up_storage_writer(True)
    plans = [SavePlan([piece.item for piece in file]) for file in _group(pieces, piece_bytes)]
    plans = [writer.prepare_local_plan(plan) for plan in writer.prepare_global_plan(plans)]
    planner: Any = _Reader({piece.item.index: piece for piece in pieces}, advance)
    results = [writer.write_data(plan, planner).wait() for plan in plans]
    tensors: dict[str, Any] = {}
    for part, entry in ((part, entries[name]) for name, part in parts.items()):
        properties = TensorProperties(dtype=getattr(torch, entry.dtype))
        tensors[part.tensor] = TensorStorageMetadata(properties, torch.Size(shapes[part.tensor]), [])
    for piece in pieces:
        tensors[piece.item.index.fqn].chunks.append(piece.chunk)
    writer.finish(Metadata(tensors, planner_data={name: (name,) for name in tensors}), results)


def _cut(
    entry: Entry, part: PublishedTensor, shapes: Mapping[str, tuple[int, ...]], piece_bytes: int
) -> Iterator[_Piece]:
    properties, start = TensorProperties(dtype=getattr(torch, entry.dtype)), entry.start
    for box in split_box(part.box, max(1, piece_bytes // SIZES[entry.dtype])):
        offsets, sizes = torch.Size(a for a, _ in box), torch.Size(b - a for a, b in box)
        chunk = ChunkStorageMetadata(offsets, sizes)
        data = TensorWriteData(chunk, properties, torch.Size(shapes[part.tensor]))
        item = WriteItem(MetadataIndex(part.tensor, offsets), WriteItemType.SHARD, tensor_data=data)
        nbytes = prod(sizes) * SIZES[entry.dtype]
        yield _Piece(item, chunk, entry.file, start, nbytes)
        start += nbytes


def _group(pieces: list[_Piece], piece_bytes: int) -> Iterator[list[_Piece]]:
    file: list[_Piece] = []
    for piece in pieces:
        if file and sum(each.nbytes for each in file) + piece.nbytes > piece_bytes:
            yield file
            file = []
        file.append(piece)
    yield file


class _Reader:
    """What DCP's writer asks for the content of an item, when its turn comes."""

    def __init__(self, pieces: Mapping[MetadataIndex, _Piece], advance: Callable[[int], None]) -> None:
        self.pieces, self.advance = pieces, advance

    def resolve_data(self, item: WriteItem) -> torch.Tensor:
        piece = self.pieces[item.index]
        assert item.tensor_data is not None
        tensor = torch.empty(piece.chunk.sizes, dtype=item.tensor_data.properties.dtype)
        with open(piece.file, "rb") as stream:
            stream.seek(piece.start)
            read = stream.readinto(tensor.view(-1).view(torch.uint8).numpy().data)
        assert read == piece.nbytes
        self.advance(piece.nbytes)
        return tensor
