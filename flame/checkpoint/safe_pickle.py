"""Reads the pickles in a DCP checkpoint without torch and without trust: nothing they say can run code."""

import io
import pickle
from collections import OrderedDict
from typing import Any

_MODULES = (  # whose classes are read as records
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.serialization",
    "torch.storage",
    "pathlib",
)


class PickledObject:
    """Whatever object a pickle asks for: its constructor's arguments, or its state, and nothing else of it."""

    def __init__(self, *args: Any) -> None:
        self.state: Any = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_pickle(data: bytes) -> Any:
    """The content of a pickle: objects as PickledObject, torch.Size as a tuple, types by name, storages by key.

    A tensor is (storage's key, offset, sizes, strides), in elements. Raises pickle.UnpicklingError for anything else,
    and whatever a damaged pickle makes Python raise.
    """
    return _Unpickler(io.BytesIO(data)).load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if known := _KNOWN.get((module, name)):
            return known
        if module in _MODULES or (module == "torch" and name.endswith("Storage")):
            return PickledObject
        if module == "torch":
            return name  # a string: torch.float32 and its kin
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint of tensors")

    def persistent_load(self, pid: Any) -> str:
        return str(pid[2])  # ("storage", its type, its key, its device, its length)


def _tensor(storage: str, offset: int, sizes: Any, strides: Any, *_: Any) -> tuple[str, int, Any, Any]:
    return storage, offset, sizes, strides


_KNOWN = {
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("collections", "OrderedDict"): OrderedDict,
}
