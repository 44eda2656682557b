"""Converts checkpoints between DCP and Hugging Face in bounded memory, whatever the model's size and layout."""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from zlib import crc32

import numpy as np

from flame.checkpoint.dtypes import FLOATS, READ_BYTES, SIZES, as_bytes, cast
from flame.checkpoint.structure import ConversionError, PublishedTensor, Structure, TensorSpecs, whole
from flame.convert.dcp_file import StoredTensor, check_tensor, read_blocks, read_tensors
from flame.convert.safetensors_file import Entry, check_file, lay_out, read_bytes, write_file

SHARD_BYTES = 2 << 30
INDEX = "model.safetensors.index.json"


def convert_dcp_to_hf(
    tensors: Mapping[str, StoredTensor],
    folder: Path,
    dtype: str | None = None,
    parts: Mapping[str, PublishedTensor] | None = None,
    *,
    advance: Callable[[int], None] = lambda count: None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write the tensors of a DCP checkpoint to `folder` as safetensors, with an index when there are several files.

    Written are `parts`, {name: PublishedTensor}, or else all tensors under their names. Floating ones are cast to
    `dtype` (torch's name) when given. `advance` is told the bytes that were written, every few MiB. Every file is read
    again after it is written. Returns {file name: sha256}.
    """
    if parts:
        parts = {name: part for name, part in parts.items() if part.tensor in tensors}  # not a tied tensor's other name
    else:
        parts = {name: whole(name, tensor.shape) for name, tensor in tensors.items()}
    stored = {name: tensors[part.tensor].dtype for name, part in parts.items()}
    wanted = {name: (dtype if dtype and stored[name] in FLOATS else stored[name], p.shape) for name, p in parts.items()}

    checked: set[str] = set()

    def blocks(name: str) -> Iterator[np.ndarray]:
        part = parts[name]
        if part.box != tensors[part.tensor].box and part.tensor not in checked:
            check_tensor(part.tensor, tensors[part.tensor])
            checked.add(part.tensor)
        head = prod(part.shape) // part.heads * SIZES[stored[name]] if part.heads else None
        for block in read_blocks(part.tensor, tensors[part.tensor], part.box, head or READ_BYTES):
            if part.heads:  # a block is a head
                block = np.concatenate([block[::2], block[1::2]])
            written = cast(block, stored[name], wanted[name][0])
            yield written
            advance(written.nbytes)

    shards = list(_split(wanted, shard_bytes))
    digests: dict[str, Future[str]] = {}
    weight_map: dict[str, str] = {}
    with ThreadPoolExecutor(1) as checker:  # reads a file again while the next is written
        for number, names in enumerate(shards, start=1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            header, entries = lay_out(folder / file, {name: wanted[name] for name in names})
            checksums = write_file(folder / file, header, entries, blocks)
            digests[file] = checker.submit(check_file, folder / file, header, entries, checksums)
            weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(prod(shape) * SIZES[kind] for kind, shape in wanted.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    return {file: digest.result() for file, digest in digests.items()}


def convert_hf_to_dcp(
    entries: Mapping[str, Entry],
    folder: Path,
    structure: Structure | None = None,
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write tensors of safetensors files to `folder` as a DCP checkpoint of a model alone; types are kept.

    They get the names and shapes of the model in `structure`, or else keep their own. What was written is read again
    and compared. `advance` is told the bytes that were written. Raises ConversionError.
    """
    from flame.convert.dcp_writer import write_checkpoint  # imports torch, which the other direction does without

    shapes = {name: entry.shape for name, entry in entries.items()}
    parts = {name: whole(name, shape) for name, shape in shapes.items()}
    if structure and structure.published_as:
        parts = {name: part for name, part in structure.published_as.items() if name in entries}
        parts = {name: part for name, part in parts.items() if part.tensor in structure.tensors}
        shapes = {name: shape for name, (_, shape) in structure.tensors.items()}
    write_checkpoint(entries, parts, shapes, folder, advance=advance)
    tensors = read_tensors(folder)
    for name, part in parts.items():
        expected = found = 0
        for view in read_bytes(entries[name]):
            expected = crc32(view, expected)
        for block in read_blocks(part.tensor, tensors[part.tensor], part.box):
            found = crc32(as_bytes(block), found)
        if (tensors[part.tensor].dtype, found) != (entries[name].dtype, expected):
            raise ConversionError(f"{folder}: {part.tensor} reads back as other bytes than {entries[name].file} holds")


def _split(wanted: TensorSpecs, shard_bytes: int) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name, (dtype, shape) in wanted.items():
        nbytes = prod(shape) * SIZES[dtype]
        if shard and size + nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += nbytes
    yield shard
