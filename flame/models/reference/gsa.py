"""Keys from a running softmax over the tokens so far: gated slot attention, chunk by chunk, and LightNet."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.models.reference.common import each_document, place_tokens, reset_at_starts, scan_chunks, wide
from flame.models.reference.linear_attention import CHUNK, gated_linear_attention


def additive_gate(
    x: Tensor, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
    output_dtype: torch.dtype | None = None, gate_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """exp(x_t - z_t), z_{t-1} - z_t and the last z, where z_t is the log of the sum of exp(x) up to token t.

    x (batch, seq, heads, K); states z (sequences, 1, heads, K) in fp32. The first token after no state has gate 0.
    """
    x_wide, length = wide(x), x.shape[1]
    begun = torch.full_like(x_wide[:, :1], -torch.inf) if initial_state is None else wide(initial_state)
    if cu_seqlens is None:
        place = torch.arange(length, device=x.device)
        first = begun
    else:
        document, place = place_tokens(cu_seqlens, length)
        # tokens after the last document are one more, without a state
        each = begun.expand(len(cu_seqlens) - 1, -1, -1, -1).squeeze(1)
        first = F.pad(each, (0, 0, 0, 0, 0, 1), value=-torch.inf)[document].unsqueeze(0)
    place = place[:, None, None]
    # Each round doubles how many tokens are summed in z: log2(seq) rounds.
    z = torch.where(place == 0, torch.logaddexp(x_wide, first), x_wide)
    reach = 1
    while reach < length:
        earlier = F.pad(z, (0, 0, 0, 0, reach, -reach)).masked_fill(place < reach, -torch.inf)
        z = torch.logaddexp(z, earlier)
        reach *= 2
    before = torch.where(place == 0, first, F.pad(z, (0, 0, 0, 0, 1, -1)))
    # z_t = log(exp(z_{t-1}) + exp(x_t)), so both are sigmoids; the difference of two z would cancel in long rows
    key = torch.sigmoid(x_wide - before)
    gate = F.logsigmoid(before - x_wide).masked_fill(before == -torch.inf, 0)
    last = z[:, -1:] if cu_seqlens is None else z[0, cu_seqlens[1:].long() - 1].unsqueeze(1)
    return key.to(output_dtype or x.dtype), gate.to(gate_dtype or x.dtype), last


def lightnet(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None,
    initial_state: tuple[Tensor | None, Tensor | None] | None = None, output_final_state: bool = False,
    state_v_first: bool = False, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor | None, Tensor]]:  # fmt: skip
    """Gated linear attention with the keys and gates of `additive_gate`; a state is a pair of both's states.

    Shapes are theirs. Source: arXiv 2405.21022.
    """
    state, z = (None, None) if initial_state is None else initial_state
    k, g, z = additive_gate(k, z, cu_seqlens)
    o, state = gated_linear_attention(
        q, k, v, g, scale=scale, initial_state=state, output_final_state=output_final_state,
        state_v_first=state_v_first, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return o, (state, z)


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
        decay = reset_at_starts(wide(g).exp(), cu_seqlens)
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
    states, state = scan_chunks(decay.unsqueeze(-2), written, state)
    o = o + since_start * (q @ states)
    return o.flatten(2, 3)[:, :, :length].transpose(1, 2), state


def pairs() -> list[tuple[Callable, Callable]]:
    """Entry points of fla, each with its reference here."""
    from fla.ops import gsa
    from fla.ops import lightnet as light
    from fla.ops.gsa import gate

    return [
        (gate.fused_additive_gate, additive_gate),
        (gsa.chunk_gsa, gated_slot_attention),
        (gsa.fused_recurrent_gsa, gated_slot_attention),
        (light.chunk_lightnet, lightnet),
        (light.fused_recurrent_lightnet, lightnet),
    ]
