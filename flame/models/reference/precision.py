"""The precision that fla's kernels compute in."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in fp32, in which the kernels compute; float64 stays float64, for the tests."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
