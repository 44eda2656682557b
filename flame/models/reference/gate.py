"""Gates from a running softmax over the tokens so far."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.models.reference.packing import place_tokens
from flame.models.reference.precision import wide


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


def pairs() -> list[tuple[Callable, Callable]]:
    """Entry points of fla, each with its reference here."""
    from fla.ops.gsa.gate import fused_additive_gate

    return [(fused_additive_gate, additive_gate)]
