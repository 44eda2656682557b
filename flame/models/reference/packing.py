"""Packed documents: where each token stands in its own."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
    """Run `op` on one document after the other, with a state for each of them, which only generation asks for."""
    bounds = cu_seqlens.tolist()
    outputs, finals = [], []
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        state = None if states is None else states[i : i + 1]
        output, final = op(*(x[:, start:end] for x in tensors), initial_state=state, **options)
        outputs.append(output)
        finals.append(final)
    return torch.cat(outputs, 1), None if finals[0] is None else torch.cat(finals)
