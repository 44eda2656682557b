"""The recurrence of the delta rule, chunk by chunk."""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32  # tokens; the state is passed from chunk to chunk, everything else is parallel


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
