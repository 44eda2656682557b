"""Softmax attention inside packed documents by PyTorch's own kernel, on a GPU without flash-attn."""

import functools
import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from flame.runtime.device import source

IMPLEMENTATION = "varlen"  # its name among transformers' attention functions


def register() -> str:
    """Add `attend` to transformers' attention functions, which make no mask for it; returns its name there."""
    AttentionInterface.register(IMPLEMENTATION, attend)
    return IMPLEMENTATION


@functools.cache
def is_available() -> bool:
    """Whether this GPU and this PyTorch have the kernel."""
    from torch.nn.attention.varlen import varlen_attn  # here and below: it imports torch._dynamo, which takes seconds

    built = torch.cuda.is_available() and torch.backends.cuda.is_flash_attention_available()
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters  # PyTorch 2.11 lacks it
    return built and grouped and torch.cuda.get_device_capability() >= (8, 0)


def takes(head_dim: int) -> bool:
    """Whether the kernel takes heads of this size, forward and backward."""
    return head_dim % 8 == 0 and (head_dim <= 192 or head_dim == 256)  # sizes between: not on every GPU


def serves(q: Tensor) -> bool:
    """Whether the kernel takes q (tokens, heads, D), and its device has it."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and takes(q.shape[-1]) and is_available()


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[Tensor, Tensor], longest: tuple[int, int], scale: float | None,
    window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Softmax attention of q (tokens, heads, D) to k and v (tokens, kv heads, D) inside each document, ends aligned.

    cu_seqlens: boundaries of the documents in q and in k, int32 (documents + 1,). longest: tokens of the longest one in
    each, or more. window_size: how many keys are seen to the left and to the right, -1 for all of them.
    """
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scale, "window_size": window_size, "enable_gqa": True}
    return cast(Tensor, varlen_attn(q, k, v, *cu_seqlens, *longest, **options))


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, scaling: float,
    cu_seq_lens_q: Tensor, max_length_q: int, sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """A function of transformers' AttentionInterface: (batch, heads, seq, D) to (batch, seq, heads, D).

    cu_seq_lens_q: boundaries of the documents in the flattened batch. max_length_q: tokens of the longest, or more.
    """
    rows = [x.transpose(1, 2) for x in (query, key, value)]
    if sliding_window is None:  # Qwen2's mixtures have it in the module alone
        sliding_window = getattr(module, "sliding_window", None)
    window = (sliding_window - 1 if sliding_window else -1, 0)
    q, k, v = (x.flatten(0, 1) for x in rows)
    o = attention(q, k, v, (cu_seq_lens_q, cu_seq_lens_q), (max_length_q, max_length_q), scaling, window)
    return o.view(rows[0].shape), None


def longest(cu_seqlens: Tensor, limit: int) -> int:
    """A bound of the longest document, at most `limit`, for which the host does not wait.

    The kernel launches blocks up to it for every document. It is a power of two, so that torch.compile, which compiles
    anew for another one, meets few.
    """
    known = source(cu_seqlens)
    return limit if known is None else min(limit, 1 << (int(known.diff().max()) - 1).bit_length())
