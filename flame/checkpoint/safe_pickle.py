"""Reads the pickles of a DCP checkpoint without torch, and never runs code that they name."""

import io
import pickle
from collections import OrderedDict
from typing import Any

_MODULES = (  # whose classes are read as PickledObject
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.serialization",
    "torch.storage",
    "pathlib",
)
_REBUILT = {
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): lambda *args: args[:4],
    ("torch._utils", "_rebuild_tensor_v3"): lambda *args: args[:4],
    ("collections", "OrderedDict"): OrderedDict,
}


class PickledObject:
    """Stands in for any object: `state` is what its constructor or __setstate__ would get."""

    def __init__(self, *args: Any) -> None:
        self.state: Any = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_pickle(data: bytes) -> Any:
    """Read a pickle: objects as PickledObject, torch.Size as a tuple, torch's dtypes by name, storages by key.

    A tensor is (storage key, offset, sizes, strides), in elements. Raises pickle.UnpicklingError for any other class,
    and whatever Python raises for a corrupted pickle.
    """
    return _Unpickler(io.BytesIO(data)).load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if known := _REBUILT.get((module, name)):
            return known
        if module in _MODULES or (module == "torch" and name.endswith("Storage")):
            return PickledObject
        if module == "torch":
            return name  # a string, such as float32
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint of tensors")

    def persistent_load(self, pid: Any) -> str:
        return str(pid[2])  # ("storage", type, key, device, length)
