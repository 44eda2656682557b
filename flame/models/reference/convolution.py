"""The short causal convolution before many mixers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.models.reference.common import each_document, place_tokens, wide


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, activation: str | None = None,
    *, backend: str | None = None, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Convolve each channel of x (batch, seq, D) with weight (D, W) over the last W tokens; add bias and residual.

    States are the last W tokens, (sequences, D, W). The activation is None, "silu" or "swish".
    """
    if cu_seqlens is not None and (initial_state is not None or output_final_state):
        options = {"weight": weight, "bias": bias, "output_final_state": output_final_state, "activation": activation}
        y, state = each_document(causal_conv1d, [x], cu_seqlens, initial_state, **options)
        return (y if residual is None else y + residual), state
    taps, (length, channels) = wide(weight), x.shape[1:]
    width = taps.shape[-1]
    before = taps.new_zeros(len(x), width, channels) if initial_state is None else wide(initial_state).mT
    padded = torch.cat([before, wide(x)], 1)
    place = None if cu_seqlens is None else place_tokens(cu_seqlens, length)[1][:, None]
    y = padded[:, width:] * taps[:, -1]
    for back in range(1, width):
        past = padded[:, width - back : width - back + length]
        if place is not None:
            past = past.masked_fill(place < back, 0)
        y = y + past * taps[:, width - 1 - back]
    if bias is not None:
        y = y + wide(bias)
    if activation is not None:
        y = {"silu": F.silu, "swish": F.silu}[activation](y)
    if residual is not None:
        y = y + wide(residual)
    return y.to(x.dtype), (padded[:, -width:].mT.to(x.dtype).contiguous() if output_final_state else None)


def causal_conv1d_update(
    x: Tensor, cache: Tensor, residual: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, activation: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`causal_conv1d` of one token for each sequence; cache (sequences, D, W) is updated in place."""
    assert weight is not None
    token = x.reshape(len(cache), 1, -1)
    added = None if residual is None else residual.reshape(token.shape)
    y, state = causal_conv1d(token, weight, bias, added, cache, True, activation)
    assert state is not None
    cache.copy_(state)
    return y.view(x.shape), cache


def pairs() -> list[tuple[Callable, Callable]]:
    """Entry points of fla, each with its reference here."""
    from fla.modules.causal_conv1d import ops

    return [(ops.causal_conv1d, causal_conv1d), (ops.causal_conv1d_update, causal_conv1d_update)]
