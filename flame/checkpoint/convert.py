"""DCP -> Hugging Face weights, a shard at a time: memory is bounded by one shard, whatever the model's size."""

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from tqdm import tqdm

_NOT_MODEL = (
    "optimizer.",
    "lr_scheduler.",
    "dataloader.",
    "train_state.",
)  # torchtitan puts the model at the top level
SHARD_BYTES = 2 << 30


def convert_dcp_to_hf(
    checkpoint: Path, folder: Path, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write a DCP checkpoint's model as safetensors shards, with an index when there are several.

    Reads the model's keys alone, from a checkpoint of any number of ranks; parameter names are kept. Floating
    tensors are cast to `dtype` when given. Returns the names written. Raises ValueError if there is no model.
    """
    stored = dcp.FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    tensors = {
        name: entry
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith(_NOT_MODEL)
    }
    if not tensors:
        raise ValueError(f"{checkpoint} holds no model")
    shards = list(_split(tensors, shard_bytes))
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(tqdm(shards, desc="writing safetensors", unit="shard", disable=None), start=1):
        state = {name: torch.empty(tensors[name].size, dtype=tensors[name].properties.dtype) for name in names}
        dcp.load(state, checkpoint_id=str(checkpoint), no_dist=True)
        if dtype is not None:
            state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(state, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(t.nbytes for t in state.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return list(weight_map)


def _split(tensors: dict[str, TensorStorageMetadata], shard_bytes: int) -> Iterable[list[str]]:
    shard: list[str] = []
    size = 0
    for name, entry in tensors.items():
        nbytes = prod(entry.size) * entry.properties.dtype.itemsize
        if shard and size + nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += nbytes
    yield shard
