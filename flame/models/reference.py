"""fla's `gla` and `transformer` in plain PyTorch, so that they build, train and generate on a machine without Triton.

fla's layers call a few entry points (norms, activations, rotary, short convolution, gated linear attention) that are
Triton kernels, and flash-attn. `enable()` puts a reference beside each: a CPU tensor takes the reference, any other
tensor takes fla's own kernel. Where flash-attn is not installed, PyTorch's attention serves on every device.

Why rebinding and not `fla.backends.register`: fla's dispatch wrappers are `torch.compiler.disable`d, so a registered
backend breaks the graph of a compiled block, and `chunk_gla`, `rms_norm` and flash-attn are not dispatched at all.
"""

import functools
import inspect
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_TYPES = frozenset({"gla", "transformer"})  # the fla model types whose every call is served here

CHUNK = 64  # tokens; the state is passed from chunk to chunk, everything else is parallel


@functools.cache  # so that a second call does nothing
def enable() -> None:
    """Serve fla's entry points from this module for CPU tensors; import fla. Calling it again does nothing."""
    import fla  # noqa: F401  (imports every layer, so that every global below exists)
    from fla.modules.activations import ops as activation
    from fla.modules.causal_conv1d import ops as conv
    from fla.modules.norm import fused_norm_gate, layernorm
    from fla.modules.norm import l2norm as l2
    from fla.modules.rotary import ops as rotary
    from fla.ops import attnres, gla

    references: tuple[tuple[Callable, Callable], ...] = (
        (layernorm.rms_norm, functools.partial(norm, is_rms_norm=True)),
        (layernorm.layer_norm, norm),
        (layernorm.group_norm, norm),
        (fused_norm_gate.rms_norm_gated, rms_norm_gated),
        (l2.l2norm, l2norm),
        (activation.swish, swish),
        (activation.sigmoid, sigmoid),
        (activation.swiglu, swiglu),
        (activation.swiglu_linear, swiglu_linear),
        (rotary.rotary_embedding, rotary_embedding),
        (conv.causal_conv1d, causal_conv1d),
        (conv.causal_conv1d_update, causal_conv1d_update),
        (gla.chunk_gla, gated_linear_attention),
        (gla.fused_recurrent_gla, gated_linear_attention),
        (attnres.fused_attnres, attnres.naive_attnres),  # fla's own reference
    )
    # The one seam. fla's files import each other's functions by name, so every module global that *is* an original
    # changes, and so does the activation table.
    replacements = {id(original): _on_cpu(reference, original) for original, reference in references}
    tables = [vars(module) for name, module in sys.modules.items() if name.startswith("fla.")]
    for table in [*tables, activation.ACT2FN]:
        for name, value in table.items():
            if id(value) in replacements:
                table[name] = replacements[id(value)]
        # fla's attention layers set flash_attn_func to None, and leave the other undefined, without flash-attn
        if "flash_attn_func" in table and str(table["__name__"]).startswith("fla.layers."):
            for name, reference in (("func", flash_attn_func), ("varlen_func", flash_attn_varlen_func)):
                original = table.get(f"flash_attn_{name}")
                table[f"flash_attn_{name}"] = _on_cpu(reference, original) if original else reference


def _on_cpu(reference: Callable, original: Callable) -> Callable:
    known = tuple(inspect.signature(reference).parameters)

    @functools.wraps(original)
    def call(*args, **kwargs):
        first = args[0] if args else kwargs[known[0]]
        if first.device.type != "cpu":
            return original(*args, **kwargs)
        for name in [name for name in kwargs if name not in known]:
            value = kwargs.pop(name)
            if value is not None and value is not False:  # swallowing it would silently compute something else
                raise NotImplementedError(f"{original.__name__}: {name} is not supported on CPU (found {value!r:.40})")
        return reference(*args, **kwargs)

    return call


def _wide(x: Tensor) -> Tensor:
    # Everything is computed in fp32, as in the kernels; float64 stays float64, for the tests.
    return x.to(torch.promote_types(x.dtype, torch.float32))


# Norms ----------------------------------------------------------------------------------------------------------------


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None, eps: float = 1e-5,
    prenorm: bool = False, residual_in_fp32: bool = False, is_rms_norm: bool = False, num_groups: int = 1,
    *, gate: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Layer norm of x + residual (..., D), in num_groups equal parts of D; with prenorm return that sum too.

    is_rms_norm leaves out the subtraction of the mean (arXiv 1910.07467); gate (..., D) multiplies the result.
    """
    total = _wide(x)
    total_dtype = torch.float32 if residual_in_fp32 else x.dtype
    if residual is not None:  # whose dtype wins over residual_in_fp32, as in the kernels
        total, total_dtype = total + _wide(residual), residual.dtype
    y = total.unflatten(-1, (num_groups, -1))
    if not is_rms_norm:
        y = y - y.mean(-1, keepdim=True)
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    if weight is not None:
        y = y * _wide(weight)
    if bias is not None:
        y = y + _wide(bias)
    if gate is not None:
        y = y * gate
    return (y.to(x.dtype), total.to(total_dtype)) if prenorm else y.to(x.dtype)


def rms_norm_gated(
    x: Tensor, g: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str = "swish",
    residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False, eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """RMS `norm` times the activation ("swish", "silu" or "sigmoid") of the gate g (..., D)."""
    gates: dict[str, Callable] = {"swish": F.silu, "silu": F.silu, "sigmoid": torch.sigmoid}
    gate = gates[activation](_wide(g))
    return norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm=True, gate=gate)


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """Divide x (..., D) by the root of its sum of squares plus eps."""
    y = _wide(x)
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + eps)).to(output_dtype or x.dtype)


# Activations ----------------------------------------------------------------------------------------------------------


def swish(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return F.silu(x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return torch.sigmoid(x)


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """swish(x) * y. Source: arXiv 2002.05202."""
    return F.silu(x) * y


def swiglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer on `swiglu`."""
    return F.linear(F.silu(x) * y, weight, bias)


# Packed documents and positions ---------------------------------------------------------------------------------------


def _place(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    # For each packed token: its document and its place in it. Tokens after the last document are one more document.
    token = torch.arange(length, device=cu_seqlens.device)
    document = torch.bucketize(token, cu_seqlens[1:].to(token.dtype), right=True)
    return document, token - cu_seqlens[document]


def _each_document(
    op: Callable, tensors: list[Tensor], cu_seqlens: Tensor, states: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    # One document after the other: a state for each of them, which only generation asks for.
    bounds = cu_seqlens.tolist()
    outputs, finals = [], []
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        state = None if states is None else states[i : i + 1]
        output, final = op(*(x[:, start:end] for x in tensors), initial_state=state, **options)
        outputs.append(output)
        finals.append(final)
    return torch.cat(outputs, 1), None if finals[0] is None else torch.cat(finals)


def rotary_embedding(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, *, seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None, chunk_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rotate pairs of x (batch, seq, heads, D) by the tables cos and sin (positions, R / 2), R <= D.

    seqlen_offsets is added to the positions: one number, or one for each sequence. Source: arXiv 2104.09864.
    """
    if cu_seqlens is None:
        position = torch.arange(x.shape[1], device=x.device)
        position = position + (seqlen_offsets[:, None] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets)
    else:
        document, position = _place(cu_seqlens, x.shape[1])
        position = position + (seqlen_offsets[document] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets)
    position = position.clamp(min=0)  # left padding has negative positions; its result is dropped later
    cos, sin = cos[position].unsqueeze(-2), sin[position].unsqueeze(-2)
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    pair = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned, rest], -1).to(x.dtype)


# Short convolution ----------------------------------------------------------------------------------------------------


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, activation: str | None = None,
    *, backend: str | None = None, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Convolve each channel of x (batch, seq, D) with weight (D, W) over the last W tokens; add bias and residual.

    States are the last W tokens, (sequences, D, W). The activation is None, "silu" or "swish".
    """
    if cu_seqlens is not None and (initial_state is not None or output_final_state):
        options = {"weight": weight, "bias": bias, "output_final_state": output_final_state, "activation": activation}
        y, state = _each_document(causal_conv1d, [x], cu_seqlens, initial_state, **options)
        return (y if residual is None else y + residual), state
    taps, (length, channels) = _wide(weight), x.shape[1:]
    width = taps.shape[-1]
    before = taps.new_zeros(len(x), width, channels) if initial_state is None else _wide(initial_state).mT
    padded = torch.cat([before, _wide(x)], 1)
    place = None if cu_seqlens is None else _place(cu_seqlens, length)[1][:, None]
    y = padded[:, width:] * taps[:, -1]
    for back in range(1, width):
        past = padded[:, width - back : width - back + length]
        if place is not None:
            past = past.masked_fill(place < back, 0)
        y = y + past * taps[:, width - 1 - back]
    if bias is not None:
        y = y + _wide(bias)
    if activation is not None:
        y = {"silu": F.silu, "swish": F.silu}[activation](y)
    if residual is not None:
        y = y + _wide(residual)
    return y.to(x.dtype), (padded[:, -width:].mT.to(x.dtype).contiguous() if output_final_state else None)


def causal_conv1d_update(
    x: Tensor, cache: Tensor, residual: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, activation: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`causal_conv1d` of one token for each sequence; cache (sequences, D, W) is updated in place."""
    assert weight is not None
    token = x.reshape(len(cache), 1, -1)
    added = None if residual is None else residual.reshape(token.shape)
    y, state = causal_conv1d(token, weight, bias, added, cache, True, activation)
    assert state is not None
    cache.copy_(state)
    return y.view(x.shape), cache


# Gated linear attention -----------------------------------------------------------------------------------------------


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
        return _each_document(gated_linear_attention, tensors, cu_seqlens, initial_state, **options)
    with torch.autocast(q.device.type, enabled=False):  # it would turn the matrix products into bf16
        decay = torch.ones_like(_wide(k)) if g is None else _wide(g).exp()
        if cu_seqlens is not None:  # the first token of a document forgets all that came before
            starts = _place(cu_seqlens, q.shape[1])[1] == 0
            decay = decay.masked_fill(starts[:, None, None], 0)
        scaled = _wide(q) * (q.shape[-1] ** -0.5 if scale is None else scale)
        state = None if initial_state is None else _wide(initial_state.mT if state_v_first else initial_state)
        o, state = _recur(scaled, _wide(k), _wide(v), decay, state)
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


# Softmax attention ----------------------------------------------------------------------------------------------------


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """Softmax attention of q (batch, queries, heads, D) to k and v (batch, keys, kv heads, D), ends aligned.

    window_size is how many keys are seen to the left and to the right, -1 for all of them. Source: arXiv 2205.14135.
    """
    queries, keys = q.shape[1], k.shape[1]
    left, right = window_size
    mask = None
    if left >= 0 or right >= 0 or (causal and queries != keys):
        position = torch.arange(keys - queries, keys, device=q.device)[:, None]
        behind = position - torch.arange(keys, device=q.device)  # how far each key lies behind each query
        right = 0 if causal else right if right >= 0 else keys
        mask = (behind >= -right) & (behind <= (left if left >= 0 else keys))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p, causal and mask is None, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return o.transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """`flash_attn_func` inside each of the documents packed into q (tokens, heads, D), k and v."""
    queries, keys = (x.diff().tolist() for x in (cu_seqlens_q, cu_seqlens_k))
    documents = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    options = (dropout_p, softmax_scale, causal, window_size)
    return torch.cat([flash_attn_func(a[None], b[None], c[None], *options)[0] for a, b, c in documents])
