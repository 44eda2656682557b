"""What fla's kernels ask of the boundaries of packed documents on a GPU, answered from the host's copy of them.

fla 0.6 reads numbers of chunks from the device, for which the host waits, in every layer (ops/common/chunk_h.py) or
every batch (ops/utils/index.py, modules/token_shift.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flame.runtime.device import source, upload


def pairs() -> list[tuple[Callable, Callable]]:
    """Functions of fla, each with the one that takes its place on every device."""
    from fla.modules import token_shift
    from fla.ops.utils import index

    functions = (index.prepare_chunk_indices, index.prepare_chunk_offsets, token_shift.prepare_maxlens)
    return [(function, _on_host(function)) for function in functions]


class _Offsets(torch.Tensor):
    """A tensor on a GPU, whose last entry is also `last`, on the host."""

    last: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Tensor:
        return self.last if isinstance(index, int) and index == -1 else super().__getitem__(index)


def _on_host(prepare: Callable) -> Callable:
    """A function of cu_seqlens and numbers, computed on the host if it has the boundaries."""
    from fla.utils import tensor_cache

    @torch.compiler.disable
    @tensor_cache
    def call(cu_seqlens: Tensor, *args: Any, **options: Any) -> Any:
        known = source(cu_seqlens)
        if known is None or known is cu_seqlens:
            return prepare(cu_seqlens, *args, **options)
        value = prepare.__wrapped__(known, *args, **options)  # type: ignore[attr-defined]  # fla's cache wraps it
        if not isinstance(value, Tensor):
            return value
        copy = upload(value, cu_seqlens.device)
        if value.ndim == 1:
            copy = copy.as_subclass(_Offsets)
            copy.last = value[-1]
        return copy

    return call
