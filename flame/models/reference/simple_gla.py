"""Linear attention whose decay is one number a head, or none: simple GLA, retention, linear attention."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.models.reference.packing import each_document, place_tokens
from flame.models.reference.precision import wide

CHUNK = 64  # tokens; the state is passed from chunk to chunk, everything else is parallel


def simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None, *,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    state_v_first: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Linear attention with scalar decays: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t.

    q and k are (batch, seq, heads, K), v and o (batch, seq, heads, V). The log decays <= 0 are g (batch, seq, heads) or
    g_gamma (heads), or none. States are (sequences, heads, K, V), or (..., V, K) with state_v_first. cu_seqlens packs
    documents into seq, with batch 1. Source: arXiv 2405.21060, section 6.
    """
    if g is not None and g_gamma is not None:  # fla's kernels disagree on what it means
        raise NotImplementedError("simple GLA with both g and g_gamma is not supported on CPU")
    given = g_gamma if g is None else g
    g = torch.zeros_like(wide(q[..., 0])) if given is None else wide(given).expand(q.shape[:3])
    if cu_seqlens is not None and (initial_state is not None or output_final_state):
        options = {"scale": scale, "output_final_state": output_final_state, "state_v_first": state_v_first}
        return each_document(simple_gla, [q, k, v, g], cu_seqlens, initial_state, **options)
    with torch.autocast(q.device.type, enabled=False):  # it would turn the matrix products into bf16
        if cu_seqlens is not None:  # the first token of a document forgets all that came before
            starts = place_tokens(cu_seqlens, q.shape[1])[1] == 0
            g = g.masked_fill(starts[:, None], -torch.inf)
        scaled = wide(q) * (q.shape[-1] ** -0.5 if scale is None else scale)
        state = None if initial_state is None else wide(initial_state.mT if state_v_first else initial_state)
        o, state = _recur(scaled, wide(k), wide(v), g, state)
    if not output_final_state:
        return o.to(q.dtype), None
    return o.to(q.dtype), (state.mT if state_v_first else state).contiguous()


def _recur(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    length = q.shape[1]
    size = min(CHUNK, length)
    q, k, v, g = (
        F.pad(x, (0, 0, 0, 0, 0, -length % size)).transpose(1, 2).unflatten(2, (-1, size))
        for x in (q, k, v, g.unsqueeze(-1))
    )  # (batch, heads, chunks, chunk, K or V or 1)
    below = torch.ones(size, size, dtype=torch.bool, device=q.device).tril(-1)
    # What decays token j until token i, summed over the tokens between them and not as a difference of two sums from
    # the start of the chunk, which would cancel when decays are strong.
    between = g.expand(*g.shape[:-1], size).masked_fill(~below, 0).cumsum(-2)
    decays = between.masked_fill(below.mT, -torch.inf).exp()
    since_start = g.cumsum(-2).exp()
    scores = (q @ k.mT) * decays
    written = (k * decays[..., -1, :, None]).mT @ v  # what each chunk adds to the state
    if state is None:
        state = torch.zeros_like(written[:, :, 0])
    states = []
    for chunk_decay, chunk_written in zip(since_start[..., -1:, :].unbind(2), written.unbind(2), strict=True):
        states.append(state)
        state = chunk_decay * state + chunk_written
    o = scores @ v + (q * since_start) @ torch.stack(states, 2)
    return o.flatten(2, 3)[:, :, :length].transpose(1, 2), state


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, normalize: bool, scale: float | None = None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | tuple[Tensor | None, Tensor | None] | None]:  # fmt: skip
    """`simple_gla` without decay; normalize divides each output by scale q_t^T (k_1 + ... + k_t).

    With normalize, a state is a pair: that of `simple_gla`, and the sum of keys (sequences, 1, heads, K).
    Source: arXiv 2006.16236.
    """
    options: dict[str, Any] = {"scale": scale, "output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
    state, keys = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    if not normalize:
        assert keys is None
        return simple_gla(q, k, v, initial_state=state, **options)
    if state is not None:  # the divisor is one more value, of ones
        state = F.pad(state, (0, 1)) if keys is None else torch.cat([state, keys.permute(0, 2, 3, 1)], -1)
    o, state = simple_gla(wide(q), k, F.pad(wide(v), (0, 1), value=1.0), initial_state=state, **options)
    o = (o[..., :-1] / (o[..., -1:] + 1e-10)).to(q.dtype)
    if state is None:
        return o, (None, None)
    return o, (state[..., :-1].contiguous(), state[..., -1:].permute(0, 3, 1, 2).contiguous())


def pairs() -> list[tuple[Callable, Callable]]:
    """Entry points of fla, each with its reference here."""
    from fla.ops import linear_attn, retention
    from fla.ops import simple_gla as simple

    # fla's own Python around the simple GLA above serves retention, once freed of its torch.compiler.disable
    disabled = [retention.chunk_retention, retention.fused_chunk_retention]
    return [
        (simple.chunk_simple_gla, simple_gla),
        (simple.fused_chunk_simple_gla, simple_gla),
        (simple.fused_recurrent_simple_gla, simple_gla),
        (simple.parallel_simple_gla, simple_gla),
        *((entry, inspect.unwrap(entry)) for entry in disabled),
        (linear_attn.chunk_linear_attn, functools.partial(linear_attention, normalize=True)),
        (linear_attn.fused_chunk_linear_attn, functools.partial(linear_attention, normalize=True)),
        (linear_attn.fused_recurrent_linear_attn, functools.partial(linear_attention, normalize=False)),
    ]
