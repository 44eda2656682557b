"""Gated slot attention, chunk by chunk."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.models.reference.gate import additive_gate
from flame.models.reference.linear_attention import gated_linear_attention
from flame.models.reference.packing import each_document, place_tokens
from flame.models.reference.precision import wide

CHUNK = 64  # tokens; the state is passed from chunk to chunk, everything else is parallel


def gated_slot_attention(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None = None, *,
    scale: float | None = None, initial_state: tuple[Tensor, Tensor] | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:  # fmt: skip
    """Read keys and values from M slots, which forget: softmax over the slots between two gated linear attentions.

    q is (batch, seq, heads, K), k (batch, seq, kv heads, K), v (batch, seq, kv heads, V), the slots' inputs s and log
    gates g <= 0 (batch, seq, kv heads, M). States are a pair (sequences, kv heads, K, M), (sequences, kv heads, M, V).
    cu_seqlens packs documents into seq, with batch 1. Without g, s goes through `additive_gate`.
    Source: arXiv 2409.07146.
    """
    if g is None:
        s, g, _ = additive_gate(wide(s), None, cu_seqlens)
    keys, values = (None, None) if initial_state is None else initial_state
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v, s, g = (x.repeat_interleave(groups, 2) for x in (k, v, s, g))
        keys, values = (None if x is None else x.repeat_interleave(groups, 1) for x in (keys, values))
    options: dict[str, Any] = {"output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores, keys = _read_slots(wide(q) * scale, k, s, g, initial_state=keys, **options)
    weights = scores.softmax(-1)
    o, values = gated_linear_attention(weights, s, wide(v), g, scale=1.0, initial_state=values, **options)
    if groups > 1 and keys is not None and values is not None:
        keys, values = (x[:, ::groups].contiguous() for x in (keys, values))
    return o.to(q.dtype), (keys, values)


def _read_slots(
    q: Tensor, k: Tensor, s: Tensor, g: Tensor, *, initial_state: Tensor | None, output_final_state: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    # S_t = S_{t-1} diag(exp(g_t)) + k_t s_t^T, o_t = q_t^T S_t: gated linear attention that decays its values
    if cu_seqlens is not None and (initial_state is not None or output_final_state):
        return each_document(
            _read_slots, [q, k, s, g], cu_seqlens, initial_state, output_final_state=output_final_state
        )
    with torch.autocast(q.device.type, enabled=False):  # it would turn the matrix products into bf16
        decay = wide(g).exp()
        if cu_seqlens is not None:  # the first token of a document forgets all that came before
            starts = place_tokens(cu_seqlens, q.shape[1])[1] == 0
            decay = decay.masked_fill(starts[:, None, None], 0)
        state = None if initial_state is None else wide(initial_state)
        o, state = _recur(wide(q), wide(k), wide(s), decay, state)
    return o, (state if output_final_state else None)


def _recur(q: Tensor, k: Tensor, s: Tensor, decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    # Blocks double from one token to a chunk. Of a block we keep what it reads of itself, each token's decay since its
    # start, the slots decayed until its end, and its whole decay. Two neighbours join by products of decays alone,
    # never a quotient or an exp of a difference: nothing overflows or cancels, however strong the decay.
    length = q.shape[1]
    size = min(CHUNK, 1 << (length - 1).bit_length())
    pad = (0, 0, 0, 0, 0, -length % size)
    q, k, s = (F.pad(x, pad).transpose(1, 2).unsqueeze(3) for x in (q, k, s))  # (batch, heads, blocks, block, K or M)
    decay = F.pad(decay, pad, value=1.0).transpose(1, 2)  # (batch, heads, blocks, M)
    since_start, o, slots = decay.unsqueeze(3), (q * k).sum(-1, keepdim=True) * s, s
    for _ in range(size.bit_length() - 1):
        (d1, d2), (a1, a2), (o1, o2), (s1, s2), (q1, q2), (k1, k2) = (
            x.unflatten(2, (-1, 2)).unbind(3) for x in (decay, since_start, o, slots, q, k)
        )
        o = torch.cat([o1, o2 + a2 * (q2 @ k1.mT @ s1)], 3)
        since_start = torch.cat([a1, a2 * d1.unsqueeze(3)], 3)
        slots = torch.cat([s1 * d2.unsqueeze(3), s2], 3)
        q, k = torch.cat([q1, q2], 3), torch.cat([k1, k2], 3)
        decay = d1 * d2
    written = k.mT @ slots  # what each chunk adds to the state
    if state is None:
        state = torch.zeros_like(written[:, :, 0])
    states = []
    for chunk_decay, chunk_written in zip(decay.unsqueeze(-2).unbind(2), written.unbind(2), strict=True):
        states.append(state)
        state = chunk_decay * state + chunk_written
    o = o + since_start * (q @ torch.stack(states, 2))
    return o.flatten(2, 3)[:, :, :length].transpose(1, 2), state


def pairs() -> list[tuple[Callable, Callable]]:
    """Entry points of fla, each with its reference here."""
    from fla.ops import gsa

    return [(gsa.chunk_gsa, gated_slot_attention), (gsa.fused_recurrent_gsa, gated_slot_attention)]
