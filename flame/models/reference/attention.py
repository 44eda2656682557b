"""Softmax attention and the rotary embedding."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.models import varlen
from flame.models.reference.common import place_tokens
from flame.runtime.device import source


def rotary_embedding(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, *, seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None, chunk_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rotate pairs of x (batch, seq, heads, D) by the tables cos and sin (positions, R / 2), R <= D.

    seqlen_offsets is added to the positions: one number, or one for each sequence. Source: arXiv 2104.09864.
    """
    if cu_seqlens is None:
        position = torch.arange(x.shape[1], device=x.device)
        position = position + (seqlen_offsets[:, None] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets)
    else:
        document, position = place_tokens(cu_seqlens, x.shape[1])
        position = position + (seqlen_offsets[document] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets)
    position = position.clamp(min=0)  # left padding has negative positions; its result is dropped later
    cos, sin = cos[position].unsqueeze(-2), sin[position].unsqueeze(-2)
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    pair = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned, rest], -1).to(x.dtype)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """Softmax attention of q (batch, queries, heads, D) to k and v (batch, keys, kv heads, D), ends aligned.

    window_size is how many keys are seen to the left and to the right, -1 for all of them. Source: arXiv 2205.14135.
    """
    queries, keys = q.shape[1], k.shape[1]
    left, right = window_size
    mask = None
    if left >= 0 or right >= 0 or (causal and queries != keys):
        position = torch.arange(keys - queries, keys, device=q.device)[:, None]
        distance = position - torch.arange(keys, device=q.device)  # of each query to each key, positive to the left
        right = 0 if causal else right if right >= 0 else keys
        mask = (distance >= -right) & (distance <= (left if left >= 0 else keys))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p, causal and mask is None, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return o.transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """`flash_attn_func` inside each of the documents packed into q (tokens, heads, D), k and v."""
    if not dropout_p and varlen.serves(q):
        bounds = (cu_seqlens_q, cu_seqlens_k)
        longest = (varlen.longest(cu_seqlens_q, max_seqlen_q), varlen.longest(cu_seqlens_k, max_seqlen_k))
        return varlen.attention(q, k, v, bounds, longest, softmax_scale, (window_size[0], 0) if causal else window_size)
    queries, keys = _lengths(cu_seqlens_q), _lengths(cu_seqlens_k)
    documents = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    options = (dropout_p, softmax_scale, causal, window_size)
    return torch.cat([flash_attn_func(a[None], b[None], c[None], *options)[0] for a, b, c in documents])


def _lengths(cu_seqlens: Tensor) -> list[int]:
    known = source(cu_seqlens)
    return (cu_seqlens if known is None else known).diff().tolist()


def pairs() -> list[tuple[Callable, Callable]]:
    """Entry points of fla, each with its reference here."""
    from fla.modules.rotary import ops as rotary
    from fla.ops import attnres

    return [
        (rotary.rotary_embedding, rotary_embedding),
        (attnres.fused_attnres, attnres.naive_attnres),  # fla's own reference
    ]
