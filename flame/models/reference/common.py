"""What the references share: the kernels' precision, packed documents, the state from chunk to chunk."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in fp32, in which the kernels compute; float64 stays float64, for the tests."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def place_tokens(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """For each of `length` packed tokens, its document and its place in it, both int64 (length,).

    Tokens after the last document are one more document.
    """
    token = torch.arange(length, device=cu_seqlens.device)
    document = torch.bucketize(token, cu_seqlens[1:].to(token.dtype), right=True)
    return document, token - cu_seqlens[document]


def each_document(
    op: Callable, tensors: list[Tensor], cu_seqlens: Tensor, states: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Run `op` on one document after the other, each with its own state; only generation needs it."""
    bounds = cu_seqlens.tolist()
    outputs, finals = [], []
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        state = None if states is None else states[i : i + 1]
        output, final = op(*(x[:, start:end] for x in tensors), initial_state=state, **options)
        outputs.append(output)
        finals.append(final)
    return torch.cat(outputs, 1), None if finals[0] is None else torch.cat(finals)


def reset_at_starts(x: Tensor, cu_seqlens: Tensor | None, value: float = 0.0) -> Tensor:
    """x (1, seq, ...) with `value` at the first token of each document; of a decay, it forgets what came before."""
    if cu_seqlens is None:
        return x
    starts = place_tokens(cu_seqlens, x.shape[1])[1] == 0
    return x.masked_fill(starts.view(-1, *[1] * (x.ndim - 2)), value)


def previous(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x (batch, seq, ...) of the token before each, zero before the first of each document."""
    return reset_at_starts(torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1), cu_seqlens)


def scan_chunks(decay: Tensor, written: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The states before each chunk and the last one: S_c = decay_c S_{c-1} + written_c, from `state` or zero.

    decay and written are (batch, heads, chunks, ...), so are the states; the last is (batch, heads, ...).
    """
    if state is None:
        state = torch.zeros_like(written[:, :, 0])
    states = []
    for chunk_decay, chunk_written in zip(decay.unbind(2), written.unbind(2), strict=True):
        states.append(state)
        state = chunk_decay * state + chunk_written
    return torch.stack(states, 2), state
