"""A folder that `AutoModelForCausalLM.from_pretrained` loads, made from a DCP checkpoint a tensor at a time."""

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import torch

from flame.checkpoint.dtypes import FLOATS, SIZES
from flame.checkpoint.structure import PublishedTensor, main_dtype, whole
from flame.config.files import read_json
from flame.convert.dcp_file import StoredTensor, read_tensors
from flame.convert.hf_weights import specs_of
from flame.convert.output import copy_assets, delete_abandoned, is_exported, new_folder, origin_of, write_report
from flame.convert.safetensors_file import INDEX, check_file, group_by_bytes, write_file
from flame.convert.tokenizer import settle_tokenizer

SHARD_BYTES = 2 << 30


def export_checkpoint(
    checkpoint: Path,
    assets: Path,
    folder: Path,
    dtype: str | None = None,
    *,
    published_as: Mapping[str, PublishedTensor] | None = None,
    verify: Callable[[Path], dict[str, Any]] = lambda folder: {},
    advance: Callable[[int], None] = lambda count: None,
) -> bool:
    """Export a DCP checkpoint to `folder`, whole or not at all; returns False if this very one is there already.

    `assets` has config and tokenizer; for the weights see `convert_dcp_to_hf`. `verify` checks the export before it
    gets its name, and what it returns goes into the report. An export of another checkpoint of the same name (its steps
    were done again), or what is left of one, is moved aside. Raises UserError if another process made one meanwhile.
    """
    if (exists := folder.exists()) and is_exported(checkpoint, folder, dtype):
        delete_abandoned(folder.parent)
        return False
    tensors = read_tensors(checkpoint)
    found = specs_of(tensors)
    with new_folder(folder) as temporary:
        copy_assets(assets, temporary)
        digests = convert_dcp_to_hf(tensors, temporary, dtype, published_as, advance=advance)
        settle_tokenizer(temporary)
        _set_dtype(temporary / "config.json", dtype or main_dtype(found))
        write_report(
            temporary,
            digests,
            checkpoint=str(checkpoint.resolve()),
            **origin_of(checkpoint, dtype),
            tensors=len(tensors),
            parameters=sum(prod(shape) for _, shape in found.values()),
            checks={"bytes": "every tensor reads back as it was written"} | verify(temporary),
        )
        if exists:
            old = (folder.with_name(f"{folder.name}.old-{n}") for n in count(1))
            os.rename(folder, next(path for path in old if not path.exists()))
    return True


def convert_dcp_to_hf(
    tensors: Mapping[str, StoredTensor],
    folder: Path,
    dtype: str | None = None,
    published_as: Mapping[str, PublishedTensor] | None = None,
    *,
    advance: Callable[[int], None] = lambda count: None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write the tensors of a DCP checkpoint to `folder` as safetensors, with an index when there are several files.

    They are written as `published_as` says, or under their own names if it has none of them. Floating-point ones are
    cast to `dtype` (torch's name) when given. `advance` is called with the bytes of each tensor.
    Every file is read again after it is written. Returns {file name: sha256}.
    """
    parts = {name: part for name, part in (published_as or {}).items() if part.tensor in tensors}  # no further names
    parts = parts or {name: whole(name, tensor.shape) for name, tensor in tensors.items()}
    stored = {name: tensors[part.tensor].dtype for name, part in parts.items()}
    wanted = {name: (dtype if dtype and stored[name] in FLOATS else stored[name], p.shape) for name, p in parts.items()}
    names = sorted(parts, key=lambda name: (parts[name].tensor, parts[name].start))  # reads a chunk once

    def read(name: str) -> torch.Tensor:
        part = parts[name]
        tensor = tensors[part.tensor].read(part.box).view(part.shape)
        if part.heads:  # of each head the even rows come first, then the odd ones
            tensor = tensor.unflatten(0, (part.heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        tensor = tensor.to(getattr(torch, wanted[name][0]))
        advance(tensor.nbytes)
        return tensor

    nbytes = {name: prod(shape) * SIZES[kind] for name, (kind, shape) in wanted.items()}
    shards = list(group_by_bytes(names, nbytes.__getitem__, shard_bytes))
    digests: dict[str, str] = {}
    checks: list[Future[None]] = []
    weight_map: dict[str, str] = {}
    with ThreadPoolExecutor(1) as checker:  # reads a file again while the next is written
        for number, names in enumerate(shards, start=1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            digests[file] = write_file(folder / file, {name: wanted[name] for name in names}, read)
            checks.append(checker.submit(check_file, folder / file, digests[file]))
            weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(nbytes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    for check in checks:
        check.result()
    return digests


def _set_dtype(path: Path, dtype: str) -> None:
    """Set the dtype in a config.json, as which `from_pretrained` loads the weights."""
    config = read_json(path)
    config.pop("torch_dtype", None)
    path.write_text(json.dumps(config | {"dtype": dtype}, indent=2, sort_keys=True) + "\n")
