"""The step to the token before, which RWKV mixes into each token."""

from collections.abc import Callable

import torch
from torch import Tensor

from flame.models.reference.packing import place_tokens


def previous(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x (batch, seq, ...) of the token before each, zero before the first of each document."""
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    if cu_seqlens is None:
        return before
    starts = place_tokens(cu_seqlens, x.shape[1])[1] == 0
    return before.masked_fill(starts.view(-1, *[1] * (x.ndim - 2)), 0)


def token_shift(
    x: Tensor, cu_seqlens: Tensor | None = None, cache: Tensor | None = None, output_cache: bool = False,
    chunk_indices: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The token before minus x (batch, seq, D). cache (sequences, D) stands before the first tokens, else zero does.

    With output_cache return the last tokens too, the cache of a continuation.
    """
    before = previous(x, cu_seqlens)
    if cu_seqlens is None:
        last = x[:, -1]
        if cache is not None:
            before = torch.cat([cache[:, None], before[:, 1:]], 1)
    else:
        last = x[0, cu_seqlens[1:] - 1]
        if cache is not None:
            document, place = place_tokens(cu_seqlens, x.shape[1])
            before = torch.where((place == 0)[:, None], cache[document], before)
    return (before - x, last) if output_cache else before - x


def pairs() -> list[tuple[Callable, Callable]]:
    """Entry points of fla, each with its reference here."""
    from fla.modules import token_shift as module

    return [(module.token_shift, token_shift)]
