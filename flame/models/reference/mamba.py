"""Mamba and Mamba 2: state space models whose decays and writes depend on the input.

fla takes their kernels from the package mamba_ssm. Its own PyTorch fallback runs Mamba token by token in a time that
grows with the square of seq. Mamba 2's takes gigabytes for each layer, and repeats groups in another order than those
kernels and its own decoding do. So `mamba` replaces fla's layer on a CPU, and `mamba2` on a GPU as well: it calls entry
points of fla that are Triton kernels there, and references on a CPU.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.models.reference.common import wide
from flame.models.reference.norm import norm

CHUNK = 32  # tokens; all chunks step from token to token together, then the state passes from chunk to chunk


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence of Mamba: S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t. Source: arXiv 2312.00752.

    x, dt >= 0 and y are (batch, seq, D), A <= 0 is (D, N), B and C are (batch, seq, N), states (batch, D, N).
    """
    length = x.shape[1]
    size = min(CHUNK, 1 << (length - 1).bit_length())
    x, dt, A, B, C = (wide(t) for t in (x, dt, A, B, C))
    x, dt, B, C = (F.pad(t, (0, 0, 0, -length % size)).unflatten(1, (-1, size)) for t in (x, dt, B, C))
    decays = (dt[..., None] * A).exp().unbind(2)  # one (batch, chunks, D, N) for each place in a chunk
    written = ((dt * x)[..., None] * B[..., None, :]).unbind(2)
    # Since the start of its chunk: the decay up to each token, a product and never a quotient, and what was written.
    through, local = [decays[0]], [written[0]]
    for decay, write in zip(decays[1:], written[1:], strict=True):
        through.append(through[-1] * decay)
        local.append(torch.addcmul(write, decay, local[-1]))
    state = torch.zeros_like(local[0][:, 0]) if initial_state is None else wide(initial_state)
    states = []
    for decay, write in zip(through[-1].unbind(1), local[-1].unbind(1), strict=True):
        states.append(state)
        state = torch.addcmul(write, decay, state)
    before = torch.stack(states, 1)
    tokens = zip(through, local, C.unbind(2), strict=True)
    y = [(torch.addcmul(write, decay, before) * c[..., None, :]).sum(-1) for decay, write, c in tokens]
    return torch.stack(y, 2).flatten(1, 2)[:, :length], state


def state_space_duality(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The recurrence of Mamba 2, `selective_scan` with one decay for each head. Source: arXiv 2405.21060.

    x and y are (batch, seq, heads, P), dt >= 0 is (batch, seq, heads), A <= 0 (heads,), B and C are (batch, seq,
    groups, N), each group shared by neighbouring heads, states (batch, heads, P, N).
    """
    from fla.ops.simple_gla import chunk_simple_gla

    shared = x.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(shared, 2) for t in (B, C))
    dt = wide(dt)
    return chunk_simple_gla(
        C, B, (dt[..., None] * x).to(x.dtype), dt * wide(A), scale=1.0, initial_state=initial_state,
        output_final_state=output_final_state, state_v_first=True,
    )  # fmt: skip


def mamba(
    layer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None,
    use_cache: bool | None = False, output_attentions: bool | None = False,
) -> tuple[Tensor, None, Any]:  # fmt: skip
    """The forward of fla's Mamba layer on hidden_states (batch, seq, hidden); attention_mask (batch, seq) is 0 or 1."""
    last, mask = _cached(layer, hidden_states, attention_mask, past_key_values)
    x, gate = layer.in_proj(hidden_states).chunk(2, -1)
    x, conv_state = _convolve(layer, x, mask, last, use_cache)
    sizes = [layer.dt_rank, layer.ssm_state_size, layer.ssm_state_size]
    dt, B, C = layer.x_proj(x).split(sizes, -1)
    dt, A = F.softplus(wide(layer.dt_proj(dt))), -wide(layer.A_log).exp()
    y, state = selective_scan(x, dt, A, B, C, last and last["recurrent_state"])
    y = (y + wide(x) * wide(layer.D)) * layer.act(wide(gate))
    _remember(layer, past_key_values, use_cache, state, conv_state, hidden_states.shape[1])
    return layer.out_proj(y.to(hidden_states.dtype)), None, past_key_values


def mamba2(
    layer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None,
    use_cache: bool | None = False, output_attentions: bool | None = False,
) -> tuple[Tensor, None, Any]:  # fmt: skip
    """The forward of fla's Mamba 2 layer on hidden_states (batch, seq, hidden), attention_mask as in `mamba`."""
    last, mask = _cached(layer, hidden_states, attention_mask, past_key_values)
    if mask is not None:
        hidden_states = hidden_states * mask.to(hidden_states.dtype)
    inner, group = layer.intermediate_size, layer.n_groups * layer.ssm_state_size
    gate, x, dt = layer.in_proj(hidden_states).split([inner, inner + 2 * group, layer.num_heads], -1)
    x, conv_state = _convolve(layer, x, mask, last, use_cache)
    x, B, C = x.split([inner, group, group], -1)
    x = x.unflatten(-1, (layer.num_heads, -1))
    B, C = (t.unflatten(-1, (layer.n_groups, -1)) for t in (B, C))
    dt = F.softplus(wide(dt) + wide(layer.dt_bias)).clamp(*layer.dt_limit)
    state = last and last["recurrent_state"]
    y, state = state_space_duality(x, dt, -wide(layer.A_log).exp(), B, C, state, bool(use_cache))
    D = layer.D.to(x.dtype).view(layer.num_heads, -1)  # a number for each head or each channel
    y = torch.addcmul(y, x, D).flatten(2)
    y = layer.norm(y, gate) if layer.rmsnorm else y * layer.act(gate)
    _remember(layer, past_key_values, use_cache, state, conv_state, hidden_states.shape[1])
    return layer.out_proj(y.to(hidden_states.dtype)), None, past_key_values


def _cached(layer: Any, x: Tensor, mask: Tensor | None, cache: Any) -> tuple[Any, Tensor | None]:
    from fla.layers.utils import get_layer_cache

    last = get_layer_cache(layer, cache)
    # as in fla, padding is masked in the prompt only: later the mask spans tokens that are not in x
    return last, (mask[..., None] if mask is not None and last is None and mask.shape == x.shape[:2] else None)


def _convolve(layer: Any, x: Tensor, mask: Tensor | None, last: Any, use_cache: bool | None) -> Any:
    from fla.modules.causal_conv1d import causal_conv1d

    if mask is not None:
        x = x * mask.to(x.dtype)
    state = last and last["conv_state"]
    fused = layer.activation if layer.activation in ("silu", "swish") else None
    y, state = causal_conv1d(x, layer.conv1d.weight[:, 0], layer.conv1d.bias, None, state, bool(use_cache), fused)
    y = y if fused else layer.act(y)
    return (y if mask is None else y * mask.to(y.dtype)), state


def _remember(layer: Any, cache: Any, use_cache: bool | None, state: Any, conv_state: Any, length: int) -> None:
    from fla.layers.utils import update_layer_cache

    if use_cache:
        update_layer_cache(layer, cache, recurrent_state=state, conv_state=conv_state, offset=length)


def rms_norm_gated(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None = None, eps: float = 1e-6,
    group_size: int | None = None, norm_before_gate: bool = True,
) -> Tensor:  # fmt: skip
    """RMS norm of x (..., D) in groups of group_size, times swish of the gate z (..., D), after it or before it."""
    groups, gate, total = x.shape[-1] // (group_size or x.shape[-1]), None if z is None else F.silu(wide(z)), wide(x)
    if gate is not None and not norm_before_gate:
        total, gate = total * gate, None
    y = norm(total, weight, bias, eps=eps, is_rms_norm=True, num_groups=groups, gate=gate)
    assert isinstance(y, Tensor)
    return y.to(x.dtype)


def pairs() -> list[tuple[Callable, Callable]]:
    """Entry points of fla, each with its reference here."""
    from fla.modules.norm import layernorm_gated

    return [(layernorm_gated.rmsnorm_fn, rms_norm_gated)]
