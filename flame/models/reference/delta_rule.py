"""Mixers of the delta rule, which overwrites what the state holds under a key."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.models.reference.common import each_document, reset_at_starts, wide
from flame.models.reference.norm import l2norm

CHUNK = 32  # tokens; the state is passed from chunk to chunk, everything else is parallel


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None = None, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """DeltaNet: S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T, o_t = scale q_t^T S_t. Source: arXiv 2406.06484.

    q and k are (batch, seq, heads, K), v and o (batch, seq, heads, V), beta (batch, seq, heads), None for 1, states
    (sequences, heads, K, V). use_qk_l2norm_in_kernel divides q and k by their norms. cu_seqlens packs documents into
    seq, with batch 1.
    """
    options = (scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, False, cu_seqlens)
    return _mix(q, k, v, None, _strength(v, beta), *options)


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, beta: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False,
    use_gate_in_kernel: bool = False, A_log: Tensor | None = None, dt_bias: Tensor | None = None,
    state_v_first: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gated DeltaNet: `delta_rule` on a state that first decays by exp(g_t). Source: arXiv 2412.06464.

    v may have a multiple of the heads of q and k. g <= 0 and beta are (batch, seq, value heads). use_gate_in_kernel
    makes g -exp(A_log) softplus(g + dt_bias), both (value heads,); use_beta_sigmoid_in_kernel makes beta sigmoid(beta),
    and allow_neg_eigval twice that. States are (sequences, value heads, K, V), or (..., V, K) with state_v_first.
    """
    beta = _strength(v, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    if use_gate_in_kernel:
        g = _log_decay(g, A_log, dt_bias)
    options = (scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, state_v_first, cu_seqlens)
    return _mix(q, k, v, g, beta, *options)


def kimi_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False, use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None, dt_bias: Tensor | None = None, safe_gate: bool = False,
    lower_bound: float | None = None, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """KDA: `gated_delta_rule` with g (batch, seq, value heads, K), a decay of each key channel. arXiv 2510.26692.

    dt_bias is (value heads * K,). With a lower_bound the gate is lower_bound sigmoid(exp(A_log) (g + dt_bias)), A_log
    None for 0; safe_gate promises the kernel such a gate and changes nothing here.
    """
    if safe_gate and use_gate_in_kernel and (lower_bound is None or not -5 <= lower_bound < 0):  # as the kernel does
        raise ValueError(f"safe_gate needs a lower_bound from -5 to below 0 (found {lower_bound})")
    beta = _strength(v, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    if use_gate_in_kernel:
        g = _log_decay(g, A_log, dt_bias, lower_bound)
    options = (scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, state_v_first, cu_seqlens)
    return _mix(q, k, v, g, beta, *options)


def gated_delta_product(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, num_householder: int,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gated DeltaProduct: each token decays the state, takes n steps of `delta_rule`, then reads. arXiv 2502.10297.

    n is num_householder; k, v and beta are (batch, seq * n, ...), q and g (batch, seq, ...), cu_seqlens counts in seq.
    """
    steps = num_householder
    q = F.pad(q.unsqueeze(2), (0, 0, 0, 0, steps - 1, 0)).flatten(1, 2)
    g = None if g is None else F.pad(_even(g).unsqueeze(2), (0, 0, 0, steps - 1)).flatten(1, 2)
    bounds = None if cu_seqlens is None else cu_seqlens * steps
    options = (scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, False, bounds)
    o, state = _mix(q, k, v, g, _strength(v, beta), *options)
    return o[:, steps - 1 :: steps], state


def _strength(v: Tensor, beta: Tensor | None, logits: bool = False, doubled: bool = False) -> Tensor:
    if beta is None:
        beta = v.new_ones(v.shape[:3])
    if beta.ndim != 3:
        raise NotImplementedError(f"a beta for each value channel is not supported on CPU (found {tuple(beta.shape)})")
    if doubled and not logits:  # as the kernel does
        raise ValueError("allow_neg_eigval needs use_beta_sigmoid_in_kernel")
    beta = wide(beta).sigmoid() if logits else wide(beta)
    return beta * 2 if doubled else beta


def _log_decay(g: Tensor | None, A_log: Tensor | None, dt_bias: Tensor | None, lower: float | None = None) -> Tensor:
    assert g is not None and (A_log is not None or lower is not None)
    g = wide(g)
    if dt_bias is not None:
        g = g + wide(dt_bias).view(g.shape[2:])
    rate = 1.0 if A_log is None else wide(A_log).exp().view(-1, *[1] * (g.ndim - 3))
    return -rate * F.softplus(g) if lower is None else lower * torch.sigmoid(rate * g)


def _even(x: Tensor) -> Tensor:
    # The same, with a contiguous gradient: compiled, the backward of softplus trusts it to be (seen with torch 2.13).
    return x.flatten().view(x.shape)


def _mix(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float | None, initial_state: Tensor | None,
    output_final_state: bool, unit: bool, v_first: bool, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    with torch.autocast(q.device.type, enabled=False):  # it would turn the matrix products into bf16
        q, k = (l2norm(wide(x)) if unit else wide(x) for x in (q, k))
        q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
        decay = torch.ones_like(beta) if g is None else wide(_even(g)).exp()
        decay = decay.unsqueeze(-1) if decay.ndim == 3 else decay
        state = None if initial_state is None else wide(initial_state.mT if v_first else initial_state)
        if cu_seqlens is not None and (initial_state is not None or output_final_state):
            tensors = [q, k, wide(v), decay, beta.unsqueeze(-1)]
            o, state = each_document(recur_in_chunks, tensors, cu_seqlens, state)
        else:
            decay = reset_at_starts(decay, cu_seqlens)
            o, state = recur_in_chunks(q, k, wide(v), decay, beta.unsqueeze(-1), state)
    if not output_final_state:
        return o.to(v.dtype), None
    assert state is not None
    return o.to(v.dtype), (state.mT if v_first else state).contiguous()


def recur_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """o_t = q_t^T S_t and the last S of S_t = S' + k_t u_t^T, u_t = beta_t (v_t - S'^T k_t), S' = decay_t S_{t-1}.

    q and k are (batch, seq, heads, K), v and o (batch, seq, heads, V), decay (batch, seq, heads, K or 1) within [0, 1],
    beta (batch, seq, heads, 1), states (batch, heads, K, V). The triangular form is that of arXiv 2406.06484.
    """
    # On the decayed state S a token's u is beta v - S^T (beta k). So each token reads the past twice: with q for its
    # output, and with beta k for its correction. Blocks double from one token to a chunk. Of a block we keep both
    # readers decayed since its start, its keys decayed until its end, its whole decay, and what each reader sees of
    # each key. Two neighbours join by products of decays alone, never a quotient or an exp of a difference: nothing
    # overflows or cancels, however strong the decay. The u of a chunk then solve one triangular system.
    length = q.shape[1]
    size = min(CHUNK, 1 << (length - 1).bit_length())
    pad = (0, 0, 0, 0, 0, -length % size)
    q, k, v, beta = (F.pad(x, pad).transpose(1, 2) for x in (q, k, v, beta))
    decay = F.pad(decay, pad, value=1.0).transpose(1, 2)  # (batch, heads, blocks, K or 1)
    readers = (torch.stack([q, beta * k], 3) * decay.unsqueeze(3)).unsqueeze(4)  # (batch, heads, blocks, 2, block, K)
    keys = k.unsqueeze(3)  # (batch, heads, blocks, block, K)
    own = (q * k).sum(-1)  # o reads the token's own write, u does not
    scores = torch.stack([own, torch.zeros_like(own)], 3)[..., None, None]  # (batch, heads, blocks, 2, block, block)
    for block in (1 << n for n in range(size.bit_length() - 1)):
        (d1, d2), (r1, r2), (k1, k2), (s1, s2) = (
            x.unflatten(2, (-1, 2)).unbind(3) for x in (decay, readers, keys, scores)
        )
        across = (r2.flatten(3, 4) @ k1.mT).unflatten(3, (2, block))
        scores = torch.cat([F.pad(s1, (0, block)), torch.cat([across, s2], -1)], -2)
        readers = torch.cat([r1, r2 * d1[..., None, None, :]], 4)
        keys = torch.cat([k1 * d2.unsqueeze(3), k2], 3)
        decay = d1 * d2
    (queries, corrections), (attend, coupled) = readers.unbind(3), scores.unbind(3)
    given = torch.cat([(beta * v).unflatten(2, (-1, size)), corrections], -1)
    solved = torch.linalg.solve_triangular(coupled, given, upper=False, unitriangular=True)
    values, erased = solved.split([v.shape[-1], k.shape[-1]], -1)  # u = values - erased S, S as the chunk begins
    state = v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1]) if initial_state is None else initial_state
    states, writes = [], []
    chunks = zip(values.unbind(2), erased.unbind(2), keys.unbind(2), decay.unsqueeze(-1).unbind(2), strict=True)
    for chunk_values, chunk_erased, chunk_keys, chunk_decay in chunks:
        states.append(state)
        writes.append(chunk_values - chunk_erased @ state)
        state = chunk_decay * state + chunk_keys.mT @ writes[-1]
    o = attend @ torch.stack(writes, 2) + queries @ torch.stack(states, 2)
    return o.flatten(2, 3)[:, :, :length].transpose(1, 2).contiguous(), state


def pairs() -> list[tuple[Callable, Callable]]:
    """Entry points of fla, each with its reference here."""
    from fla.ops import delta_rule as delta
    from fla.ops import gated_delta_product as product
    from fla.ops import gated_delta_rule as gated
    from fla.ops import kda

    return [
        (delta.chunk_delta_rule, delta_rule),
        (delta.fused_recurrent_delta_rule, delta_rule),
        (gated.chunk_gated_delta_rule, gated_delta_rule),
        (gated.fused_recurrent_gated_delta_rule, gated_delta_rule),
        (product.chunk_gated_delta_product, gated_delta_product),
        (kda.chunk_kda, kimi_delta_rule),
        (kda.fused_recurrent_kda, kimi_delta_rule),
    ]
