"""Counts memory as it is made and freed, in bytes, also that of fake tensors."""

import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that were made under it and are alive; `peak` is the most since `mark()`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def mark(self) -> int:
        """Begin a new peak; returns the bytes alive."""
        self.peak = self.now
        return self.now

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # comes back as what it does to the local tensors
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if id(storage) not in given | self._seen:
                self._seen.add(id(storage))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, id(storage), storage.nbytes())
        return result

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
