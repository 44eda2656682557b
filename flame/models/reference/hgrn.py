"""HGRN's recurrence, each channel for itself."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from flame.models.reference.packing import each_document, place_tokens
from flame.models.reference.precision import wide


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
    h, decay = wide(x), wide(g).exp()
    if cu_seqlens is not None:  # the first token of a document forgets all that came before
        starts = place_tokens(cu_seqlens, x.shape[1])[1] == 0
        decay = decay.masked_fill(starts[:, None], 0)
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
    from fla.ops import hgrn as entry

    return [(entry.chunk_hgrn, hgrn), (entry.fused_recurrent_hgrn, hgrn)]
