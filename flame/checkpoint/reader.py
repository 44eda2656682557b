"""Loads DCP checkpoints from anywhere: torch reads them with pickle, which would run code that a checkpoint names."""

import io
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from flame.checkpoint.commit import MARKER, read_marker, read_metadata, report_unreadable
from flame.checkpoint.metadata import METADATA, TensorInfo
from flame.errors import UserError, first_line


def load(state_dict: dict[str, Any], checkpoint: Path, *, no_dist: bool = False) -> None:
    """`dcp.load` of a checkpoint whose .metadata is read by `parse_metadata`, and whose values with `weights_only`.

    Raises UserError if the checkpoint holds anything else, and CheckpointException as torch does.
    """
    try:
        dcp.load(state_dict, storage_reader=Reader(checkpoint), planner=Planner(checkpoint), no_dist=no_dist)
    except CheckpointException as error:
        raise next((e for e, _ in error.failures.values() if isinstance(e, UserError)), error) from None


class Reader(FileSystemReader):
    """DCP's reader. Raises UserError when it is made if .metadata is not that of a checkpoint of tensors and values."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        found, listed = read_metadata(checkpoint), read_marker(checkpoint).get("files")
        for name, size in found.file_sizes().items():
            if listed is not None and name not in listed:
                raise UserError(str(checkpoint / METADATA), f"the file {name}", f"one that {MARKER} lists")
            with suppress(FileNotFoundError), report_unreadable(checkpoint / name):  # torch names one that is missing
                if (has := (checkpoint / name).stat().st_size) < size:
                    raise UserError(str(checkpoint / name), f"{has:,} bytes", f"{size:,}, by {METADATA}")
        self.metadata = Metadata(
            {name: _tensor(info) if info else BytesStorageMetadata() for name, info in found.tensors.items()},
            storage_data={
                MetadataIndex(name, offsets): _StorageInfo(place.file, place.start, place.length)
                for (name, offsets), place in found.places.items()
            },
            storage_meta=StorageMeta(load_id=self.load_id),
        )

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """torch's method. Raises UserError for a damaged file, as one is known without a marker."""
        try:
            return super().read_data(plan, planner)
        except (UserError, FileNotFoundError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, OSError) as error:
            is_pickle = isinstance(error, pickle.UnpicklingError)  # its message says how to run what it holds
            found = f"a damaged file ({type(error).__name__ if is_pickle else first_line(error)})"
            raise UserError(str(self.path), found, "an intact checkpoint") from None


def _tensor(info: TensorInfo) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in info.chunks]
    return TensorStorageMetadata(TensorProperties(getattr(torch, info.dtype)), torch.Size(info.shape), chunks)


class Planner(DefaultLoadPlanner):
    """DCP's planner, which loads what is not a tensor without running code."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        self.checkpoint = checkpoint

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """torch's method with weights_only. Raises UserError for a value that this does not allow."""
        name = read_item.dest_index.fqn
        try:
            loaded = torch.load(value, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError):
            found = "a pickle of something else, or a broken one"  # torch's message says how to run it
            raise UserError(f"{self.checkpoint}: {name}", found, "numbers, text or tensors") from None
        set_element(self.original_state_dict, self.mappings[name], loaded)
