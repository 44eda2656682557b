"""Gated linear attention, chunk by chunk."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.models.reference.packing import each_document, place_tokens
from flame.models.reference.precision import wide

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
        decay = torch.ones_like(wide(k)) if g is None else wide(g).exp()
        if cu_seqlens is not None:  # the first token of a document forgets all that came before
            starts = place_tokens(cu_seqlens, q.shape[1])[1] == 0
            decay = decay.masked_fill(starts[:, None, None], 0)
        scaled = wide(q) * (q.shape[-1] ** -0.5 if scale is None else scale)
        state = None if initial_state is None else wide(initial_state.mT if state_v_first else initial_state)
        o, state = _recur(scaled, wide(k), wide(v), decay, state)
    if not output_final_state:
        return o.to(v.dtype), None
    return o.to(v.dtype), (state.mT if state_v_first else state).contiguous()


def _recur(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
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
    if state is None:
        state = torch.zeros_like(written[:, :, 0])
    states = []
    for chunk_decay, chunk_written in zip(decay.unsqueeze(-1).unbind(2), written.unbind(2), strict=True):
        states.append(state)
        state = chunk_decay * state + chunk_written
    o = scores @ v + queries @ torch.stack(states, 2)
    return o.flatten(2, 3)[:, :, :length].transpose(1, 2), state


def pairs() -> list[tuple[Callable, Callable]]:
    """Entry points of fla, each with its reference here."""
    from fla.ops import gla

    return [(gla.chunk_gla, gated_linear_attention), (gla.fused_recurrent_gla, gated_linear_attention)]
