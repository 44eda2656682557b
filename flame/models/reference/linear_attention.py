"""Linear attention with decays per channel (GLA), per head (simple GLA, retention) or none, and HGRN's gated sum."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.models.reference.common import each_document, reset_at_starts, scan_chunks, wide

CHUNK = 64  # tokens; the state is passed from chunk to chunk, everything else is parallel


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, gk: Tensor | None = None, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, state_v_first: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gated linear attention: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t. Source: arXiv 2312.06635.

    q, k and the log decays g <= 0 (gk in fla's recurrent form; None is no decay) are (batch, seq, heads, K), v and o
    (batch, seq, heads, V), states (sequences, heads, K, V), or (..., V, K) with state_v_first. cu_seqlens packs
    documents into seq, with batch 1.
    """
    g = gk if g is None else g
    if cu_seqlens is not None and (initial_state is not None or output_final_state):
        options = {"scale": scale, "output_final_state": output_final_state, "state_v_first": state_v_first}
        tensors = [q, k, v, torch.zeros_like(k) if g is None else g]
        return each_document(gated_linear_attention, tensors, cu_seqlens, initial_state, **options)
    with torch.autocast(q.device.type, enabled=False):  # it would turn the matrix products into bf16
        decay = reset_at_starts(torch.ones_like(wide(k)) if g is None else wide(g).exp(), cu_seqlens)
        scaled = wide(q) * (q.shape[-1] ** -0.5 if scale is None else scale)
        state = None if initial_state is None else wide(initial_state.mT if state_v_first else initial_state)
        o, state = _recur_gla(scaled, wide(k), wide(v), decay, state)
    if not output_final_state:
        return o.to(v.dtype), None
    return o.to(v.dtype), (state.mT if state_v_first else state).contiguous()


def _recur_gla(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    # Blocks double from one token to a chunk. Of a block we keep its queries decayed since its start, its keys decayed
    # until its end, its whole decay and its scores. Two neighbours join by products of decays alone, never a quotient
    # or an exp of a difference: nothing overflows or cancels, however strong the decay. Each token costs
    # O(K log CHUNK), where the usual masked differences cost O(K CHUNK).
    length = q.shape[1]
    size = min(CHUNK, 1 << (length - 1).bit_length())
    pad = (0, 0, 0, 0, 0, -length % size)
    q, k, v = (F.pad(x, pad).transpose(1, 2) for x in (q, k, v))
    decay = F.pad(decay, pad, value=1.0).transpose(1, 2)  # (batch, heads, blocks, K)
    queries, keys = (q * decay).unsqueeze(3), k.unsqueeze(3)  # (batch, heads, blocks, block, K)
    scores = (q * k).sum(-1)[..., None, None]  # (batch, heads, blocks, block, block)
    for block in (1 << n for n in range(size.bit_length() - 1)):
        (d1, d2), (q1, q2), (k1, k2), (s1, s2) = (
            x.unflatten(2, (-1, 2)).unbind(3) for x in (decay, queries, keys, scores)
        )
        scores = torch.cat([F.pad(s1, (0, block)), torch.cat([q2 @ k1.mT, s2], -1)], -2)
        queries = torch.cat([q1, q2 * d1.unsqueeze(3)], 3)
        keys = torch.cat([k1 * d2.unsqueeze(3), k2], 3)
        decay = d1 * d2
    v = v.unflatten(2, (-1, size))
    written = keys.mT @ v  # what each chunk adds to the state
    states, state = scan_chunks(decay.unsqueeze(-1), written, state)
    o = scores @ v + queries @ states
    return o.flatten(2, 3)[:, :, :length].transpose(1, 2), state


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
        g = reset_at_starts(g, cu_seqlens, -torch.inf)
        scaled = wide(q) * (q.shape[-1] ** -0.5 if scale is None else scale)
        state = None if initial_state is None else wide(initial_state.mT if state_v_first else initial_state)
        o, state = _recur_simple_gla(scaled, wide(k), wide(v), g, state)
    if not output_final_state:
        return o.to(q.dtype), None
    return o.to(q.dtype), (state.mT if state_v_first else state).contiguous()


def _recur_simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
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
    states, state = scan_chunks(since_start[..., -1:, :], written, state)
    o = scores @ v + (q * since_start) @ states
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


def hgrn(
    x: Tensor, g: Tensor, initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gate and add, channel by channel: h_t = exp(g_t) h_{t-1} + x_t; the outputs are h. Source: arXiv 2311.04823.

    x, the log gates g <= 0 and h are (batch, seq, D), states (sequences, D). cu_seqlens packs documents into seq, with
    batch 1.
    """
    if cu_seqlens is not None and (initial_state is not None or output_final_state):
        return each_document(hgrn, [x, g], cu_seqlens, initial_state, output_final_state=output_final_state)
    h, decay = wide(x), reset_at_starts(wide(g).exp(), cu_seqlens)
    # Each round doubles how many tokens are joined in h and in their decay: log2(seq) rounds of products of decays,
    # never a quotient, so that nothing overflows or cancels, however strong the decay.
    reach, length = 1, x.shape[1]
    while reach < length:
        h = h + decay * F.pad(h, (0, 0, reach, -reach))
        decay = decay * F.pad(decay, (0, 0, reach, -reach), value=1.0)
        reach *= 2
    if initial_state is not None:
        h = h + decay * wide(initial_state).unsqueeze(1)
    return h.to(x.dtype), (h[:, -1].clone() if output_final_state else None)


def pairs() -> list[tuple[Callable, Callable]]:
    """Entry points of fla, each with its reference here."""
    from fla.ops import gla, linear_attn, retention
    from fla.ops import hgrn as gated_sum
    from fla.ops import simple_gla as simple

    # retention is fla's own Python around simple GLA, here without its torch.compiler.disable
    disabled = [retention.chunk_retention, retention.fused_chunk_retention]
    return [
        (gla.chunk_gla, gated_linear_attention),
        (gla.fused_recurrent_gla, gated_linear_attention),
        (simple.chunk_simple_gla, simple_gla),
        (simple.fused_chunk_simple_gla, simple_gla),
        (simple.fused_recurrent_simple_gla, simple_gla),
        (simple.parallel_simple_gla, simple_gla),
        *((entry, inspect.unwrap(entry)) for entry in disabled),
        (linear_attn.chunk_linear_attn, functools.partial(linear_attention, normalize=True)),
        (linear_attn.fused_chunk_linear_attn, functools.partial(linear_attention, normalize=True)),
        (linear_attn.fused_recurrent_linear_attn, functools.partial(linear_attention, normalize=False)),
        (gated_sum.chunk_hgrn, hgrn),
        (gated_sum.fused_recurrent_hgrn, hgrn),
    ]
