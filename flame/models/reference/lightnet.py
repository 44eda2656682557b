"""LightNet: linear attention whose keys are a running softmax over the tokens so far."""

from collections.abc import Callable

from torch import Tensor

from flame.models.reference.gate import additive_gate
from flame.models.reference.linear_attention import gated_linear_attention


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


def pairs() -> list[tuple[Callable, Callable]]:
    """Entry points of fla, each with its reference here."""
    from fla.ops import lightnet as entry

    return [(entry.chunk_lightnet, lightnet), (entry.fused_recurrent_lightnet, lightnet)]
