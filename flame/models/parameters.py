"""Parameters as a rank holds them: the local shard, and the name without the wrappers around modules."""

import torch
from torch.distributed.tensor import DTensor

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # activation checkpointing, torch.compile


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor, differentiable; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def strip_wrappers(name: str) -> str:
    """The name of a parameter or buffer without what activation checkpointing and torch.compile insert."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
