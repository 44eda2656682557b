"""RWKV 6 and RWKV 7: their mixers, the token shift, and the small operations around them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.models.reference.common import each_document, place_tokens, previous, reset_at_starts, wide
from flame.models.reference.linear_attention import gated_linear_attention

CHUNK = 32  # tokens; the state is passed from chunk to chunk, everything else is parallel


def rwkv6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, *, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """RWKV 6: o_t = scale r_t^T (S_{t-1} + u k_t v_t^T), S_t = exp(w_t) S_{t-1} + k_t v_t^T. Source: arXiv 2404.05892.

    r, k and the log decays w <= 0 are (batch, seq, heads, K), the bonus u is (heads, K), v and o are (batch, seq,
    heads, V), states (sequences, heads, K, V). cu_seqlens packs documents into seq, with batch 1.
    """
    if cu_seqlens is not None and (initial_state is not None or output_final_state):
        options = {"u": u, "scale": scale, "output_final_state": output_final_state}
        return each_document(rwkv6, [r, k, v, w], cu_seqlens, initial_state, **options)
    scale = r.shape[-1] ** -0.5 if scale is None else scale
    q, k, values, w, u = (wide(x) for x in (r, k, v, w, u))
    # Each token reads the state before its own write: gated linear attention in which all writes come one token later.
    o, state = gated_linear_attention(
        q, previous(k, cu_seqlens), previous(values, cu_seqlens), previous(w, cu_seqlens), scale=scale,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    o = o + scale * (q * u * k).sum(-1, keepdim=True) * values
    if state is not None:
        state = w[:, -1, :, :, None].exp() * state + k[:, -1, :, :, None] * values[:, -1, :, None]
    return o.to(v.dtype), state


def rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float | None = 1.0,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, safe_gate: bool = False, chunk_size: int | None = None,
    disable_recompute: bool = False, *, lower_bound: float | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """RWKV 7: S_t = exp(w_t) S_{t-1} + b_t a_t^T S_{t-1} + k_t v_t^T, o_t = scale r_t^T S_t. Source: arXiv 2503.14456.

    r, the log decays w <= 0, k, a and b are (batch, seq, heads, K), v and o (batch, seq, heads, V), states (sequences,
    heads, K, V). cu_seqlens packs documents into seq, with batch 1. The last four tune the kernel: no result depends
    on them.
    """
    if cu_seqlens is not None and (initial_state is not None or output_final_state):
        options = {"scale": scale, "output_final_state": output_final_state}
        return each_document(rwkv7, [r, w, k, v, a, b], cu_seqlens, initial_state, **options)
    with torch.autocast(r.device.type, enabled=False):  # it would turn the matrix products into bf16
        # the first token of a document forgets all that came before, and reads none of it
        decay, read = (reset_at_starts(x, cu_seqlens) for x in (wide(w).exp(), wide(a)))
        q = wide(r) * (r.shape[-1] ** -0.5 if scale is None else scale)
        state = None if initial_state is None else wide(initial_state)
        o, state = _recur(q, wide(k), wide(v), read, wide(b), decay, state)
    return o.to(v.dtype), (state if output_final_state else None)


def rwkv7_decode(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, scale: float | None = 1.0,
    initial_state: Tensor | None = None, output_final_state: bool = False, *, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`rwkv7` that takes what is removed from the state, kk, and how much of it, a, both (batch, seq, heads, K)."""
    kk = wide(kk)
    return rwkv7(r, w, k, v, -kk, kk * wide(a), scale, initial_state, output_final_state, cu_seqlens)


def _recur(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    # Blocks double from one token to a chunk by products of decays alone, as in gated linear attention, here with two
    # readers of the state (q after a token's own decay, a before it) and two writers (k, b).
    length = q.shape[1]
    size = min(CHUNK, 1 << (length - 1).bit_length())
    pad = (0, 0, 0, 0, 0, -length % size)
    q, k, v, a, b = (F.pad(x, pad).transpose(1, 2) for x in (q, k, v, a, b))
    decay = F.pad(decay, pad, value=1.0).transpose(1, 2)  # (batch, heads, blocks, K)
    readers = torch.stack([q * decay, a], 3).unsqueeze(4)  # (batch, heads, blocks, 2, block, K)
    writers = torch.stack([k, b], 3).unsqueeze(4)
    own = torch.stack([(q * k).sum(-1), (q * b).sum(-1)], -1)[..., None, None]
    scores = torch.stack([own, torch.zeros_like(own)], 3)  # (batch, heads, blocks, reader, writer, block, block)
    for block in (1 << n for n in range(size.bit_length() - 1)):
        (d1, d2), (r1, r2), (w1, w2), (s1, s2) = (
            x.unflatten(2, (-1, 2)).unbind(3) for x in (decay, readers, writers, scores)
        )
        across = r2.unsqueeze(4) @ w1.unsqueeze(3).mT
        scores = torch.cat([F.pad(s1, (0, block)), torch.cat([across, s2], -1)], -2)
        readers = torch.cat([r1, r2 * d1[..., None, None, :]], 4)
        writers = torch.cat([w1 * d2[..., None, None, :], w2], 4)
        decay = d1 * d2
    (qk, qb), (ak, ab) = (x.unbind(3) for x in scores.unbind(3))
    (q, a), (k, b) = readers.unbind(3), writers.unbind(3)
    v = v.unflatten(2, (-1, size))
    # What a reads within a chunk, x_t = a_t^T S_{t-1}, depends on the x before it: a triangular system, solved for the
    # part that is known and for the part that is linear in the state at the chunk's start.
    system = torch.eye(size, dtype=ab.dtype, device=ab.device) - ab
    solved = torch.linalg.solve_triangular(system, torch.cat([ak @ v, a], -1), upper=False, unitriangular=True)
    known, linear = solved.split([v.shape[-1], a.shape[-1]], -1)
    written, turned = k.mT @ v + b.mT @ known, b.mT @ linear
    if state is None:
        state = torch.zeros_like(written[:, :, 0])
    states = []
    for kept, turn, write in zip(decay.unsqueeze(-1).unbind(2), turned.unbind(2), written.unbind(2), strict=True):
        states.append(state)
        state = kept * state + turn @ state + write
    o = qk @ v + qb @ known + (q + qb @ linear) @ torch.stack(states, 2)
    return o.flatten(2, 3)[:, :, :length].transpose(1, 2), state


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


def mix_previous(
    hidden_states: Tensor, delta: Tensor, xr: Tensor, xw: Tensor, xk: Tensor, xv: Tensor, xa: Tensor,
    xg: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """hidden_states + delta x, both (batch, seq, D), for each of the weights x (D,) that is given."""
    x, change = wide(hidden_states), wide(delta)
    weights = (xr, xw, xk, xv, xa, xg)
    return tuple(None if m is None else (x + change * wide(m)).to(hidden_states.dtype) for m in weights)


def update_key(
    k: Tensor, a: Tensor, ka: Tensor, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None
) -> Tensor:
    """k (1 + (a - 1) ka), with k and a (batch, seq, D) and ka (D,)."""
    return (wide(k) * (1 + (wide(a) - 1) * wide(ka))).to(k.dtype)


def correct_output(o: Tensor, r: Tensor, k: Tensor, r_k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """(o + (r k r_k).sum v) g: o and g (batch, seq, heads D), r, k and v (batch, seq, heads, D), r_k (heads, D)."""
    bonus = (wide(r) * wide(k) * wide(r_k)).sum(-1, keepdim=True) * wide(v)
    return ((wide(o) + bonus.flatten(2)) * wide(g)).to(o.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2. Source: arXiv 2109.08668."""
    return F.relu(wide(x)).square().to(x.dtype)


def pairs() -> list[tuple[Callable, Callable]]:
    """Entry points of fla, each with its reference here."""
    from fla.modules import token_shift as shift
    from fla.modules.activations import ops as activation
    from fla.ops import rwkv6 as six
    from fla.ops import rwkv7 as seven
    from fla.ops.rwkv7 import fused_addcmul, fused_k_update, gate_output_correction

    return [
        (six.chunk_rwkv6, rwkv6),
        (six.fused_recurrent_rwkv6, rwkv6),
        (seven.chunk_rwkv7, rwkv7),
        (seven.fused_mul_recurrent_rwkv7, rwkv7_decode),
        (fused_addcmul.fused_addcmul_rwkv7, mix_previous),
        (fused_k_update.fused_k_rwkv7, update_key),
        (gate_output_correction.gate_output_correction, correct_output),
        (shift.token_shift, token_shift),
        (activation.sqrelu, squared_relu),  # compiled by fla, which needs a C++ compiler
    ]
