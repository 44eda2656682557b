"""The plain PyTorch references against arithmetic written out in float64."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F

from flame.models import reference
from flame.models.reference import attention, convolution, linear_attention, norm
from tests.models.kernels import gradients, worst

reference.enable()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def gla_step_by_step(q, k, v, g, scale, state):
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t].exp()[..., None] * state + k[:, t][..., None] * v[:, t][..., None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state))
    return torch.stack(outputs, 1), state


def gla_inputs(length, batch=2, strength=1.0, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    q, k, g = (torch.randn(batch, length, 3, 5, generator=rng, dtype=dtype) for _ in range(3))
    v = torch.randn(batch, length, 3, 7, generator=rng, dtype=dtype)
    return [q, k, v, F.logsigmoid(g) * strength]


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 150])
@pytest.mark.parametrize("v_first", [False, True])
def test_gla_and_all_its_gradients_equal_the_recurrence(length, v_first):
    inputs = [x.requires_grad_() for x in gla_inputs(length)]
    state = torch.randn(2, 3, 5, 7, requires_grad=True)
    given = state.mT if v_first else state
    o, final = linear_attention.gated_linear_attention(
        *inputs, initial_state=given, output_final_state=True, state_v_first=v_first
    )
    final = final.mT if v_first else final
    exact = [x.detach().double().requires_grad_() for x in (*inputs, state)]
    expected = gla_step_by_step(*exact[:4], 5**-0.5, exact[4])
    assert worst((o, final), expected) < 2e-6
    assert worst(gradients((o, final), (*inputs, state)), gradients(expected, exact)) < 5e-6


def test_gla_stays_exact_when_decays_of_minus_fifty_stand_among_weak_ones():
    q, k, v, g = gla_inputs(200, strength=1 / 16)
    g = torch.where(torch.rand(g.shape, generator=torch.Generator().manual_seed(1)) < 0.1, torch.tensor(-50.0), g)
    inputs = [x.requires_grad_() for x in (q, k, v, g)]
    o, _ = linear_attention.gated_linear_attention(*inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected, _ = gla_step_by_step(*exact, 5**-0.5, torch.zeros(2, 3, 5, 7, dtype=torch.float64))
    assert worst([o], [expected]) < 2e-6
    assert worst(gradients([o], inputs), gradients([expected], exact)) < 5e-6
    constant = torch.full_like(g, -50.0)
    o, _ = linear_attention.gated_linear_attention(q, k, v, constant)
    alone = torch.einsum("bthk,bthk,bthv->bthv", q, k, v) * 5**-0.5  # nothing of the past is left
    assert worst([o], [alone]) < 1e-6


def test_gla_honours_scale_and_reads_no_gate_as_no_decay():
    q, k, v, g = gla_inputs(70)
    without, _ = linear_attention.gated_linear_attention(q, k, v, scale=0.5)
    zero, _ = linear_attention.gated_linear_attention(q, k, v, gk=torch.zeros_like(g), scale=1.0)
    assert worst([without * 2], [zero]) < 1e-6


BOUNDS = [0, 3, 70, 71, 150]


def test_packed_gla_and_its_gradients_equal_separate_documents():
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    inputs = [x.requires_grad_() for x in gla_inputs(150, batch=1)]
    packed, _ = linear_attention.gated_linear_attention(*inputs, cu_seqlens=cu_seqlens)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    zero = torch.zeros(1, 3, 5, 7, dtype=torch.float64)
    pieces = [[x[:, a:b] for x in exact] for a, b in itertools.pairwise(BOUNDS)]
    separate = torch.cat([gla_step_by_step(*piece, 5**-0.5, zero)[0] for piece in pieces], 1)
    assert worst([packed], [separate]) < 2e-6
    assert worst(gradients([packed], inputs), gradients([separate], exact)) < 5e-6
    assert worst([linear_attention.gated_linear_attention(*inputs)[0]], [separate]) > 0.1  # unpacked, documents do leak


def test_packed_gla_carries_one_state_for_each_document():
    inputs = gla_inputs(150, batch=1)
    state = torch.randn(4, 3, 5, 7)
    o, final = linear_attention.gated_linear_attention(
        *inputs, initial_state=state, output_final_state=True, cu_seqlens=torch.tensor(BOUNDS)
    )
    for i, (a, b) in enumerate(itertools.pairwise(BOUNDS)):
        expected = gla_step_by_step(*(x[:, a:b].double() for x in inputs), 5**-0.5, state[i : i + 1].double())
        assert worst((o[:, a:b], final[i : i + 1]), expected) < 2e-6


def test_gla_computes_in_fp32_under_autocast_and_returns_the_dtype_of_v():
    q, k, v, g = (x.bfloat16() for x in gla_inputs(100))
    expected, _ = linear_attention.gated_linear_attention(q.float(), k.float(), v.float(), g.float())
    with torch.autocast("cpu", torch.bfloat16):
        o, state = linear_attention.gated_linear_attention(q, k, v, g, output_final_state=True)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(o, expected.bfloat16())


def conv_by_torch(x, weight, bias, before):
    padded = torch.cat([before.double(), x.mT.double()], -1)
    return F.conv1d(padded, weight.double()[:, None], bias.double(), groups=len(weight)).mT


@pytest.mark.parametrize("length", [1, 2, 40])
def test_causal_conv1d_equals_torch_conv1d_and_hands_on_the_last_tokens(length):
    x, weight, bias, state = torch.randn(2, length, 6), torch.randn(6, 4), torch.randn(6), torch.randn(2, 6, 4)
    residual = torch.randn_like(x)
    y, _ = convolution.causal_conv1d(x, weight, bias)
    assert worst([y], [conv_by_torch(x, weight, bias, torch.zeros(2, 6, 3))]) < 1e-6
    y, final = convolution.causal_conv1d(x, weight, bias, residual, state, True, "silu")
    expected = F.silu(conv_by_torch(x, weight, bias, state[..., 1:])) + residual
    assert worst((y, final), (expected, torch.cat([state, x.mT], -1)[..., -4:])) < 1e-6


def test_packed_causal_conv1d_equals_separate_documents():
    x, weight, bias, states = torch.randn(1, 150, 6), torch.randn(6, 4), torch.randn(6), torch.randn(4, 6, 4)
    cu_seqlens = torch.tensor(BOUNDS)
    bounds = list(itertools.pairwise(BOUNDS))
    separate = torch.cat([convolution.causal_conv1d(x[:, a:b], weight, bias)[0] for a, b in bounds], 1)
    packed, _ = convolution.causal_conv1d(x, weight, bias, cu_seqlens=cu_seqlens)
    assert worst([packed], [separate]) < 1e-6
    assert worst([convolution.causal_conv1d(x, weight, bias)[0]], [separate]) > 0.1
    _, final = convolution.causal_conv1d(x, weight, bias, None, states, True, cu_seqlens=cu_seqlens)
    expected = [torch.cat([states[i], x[0, a:b].T], -1)[:, -4:] for i, (a, b) in enumerate(bounds)]
    assert torch.equal(final, torch.stack(expected))


@pytest.mark.parametrize("shape", [(5, 6), (5, 1, 6), (1, 5, 6)])
def test_one_step_of_the_convolution_updates_the_cache_in_place(shape):
    x, weight, cache = torch.randn(shape), torch.randn(6, 4), torch.randn(5, 6, 4)
    seen = torch.cat([cache[..., 1:], x.reshape(5, 6, 1)], -1)
    y, same = convolution.causal_conv1d_update(x, cache, weight=weight, activation="silu")
    assert same is cache and torch.equal(cache, seen)
    assert worst([y], [F.silu((seen * weight).sum(-1)).view(shape)]) < 1e-6


def test_norms_equal_torch_in_float64():
    x, residual = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    weight, bias, gate = torch.randn(8).double(), torch.randn(8).double(), torch.randn(3, 8).double()
    total = x + residual
    rms = F.rms_norm(total, (8,), weight, 1e-5)
    found, carried = norm.norm(x, weight, None, residual, prenorm=True, is_rms_norm=True)
    assert worst((found, carried), (rms, total)) < 1e-14
    assert worst([norm.norm(x, weight, bias)], [F.layer_norm(x, (8,), weight, bias)]) < 1e-14
    grouped = norm.norm(x, weight, bias, num_groups=2)
    assert worst([grouped], [F.group_norm(x, 2, weight, bias)]) < 1e-14
    for name, activation in (("swish", F.silu), ("sigmoid", torch.sigmoid)):
        found = norm.rms_norm_gated(x, gate, weight, None, name, residual, eps=1e-5)
        assert worst([found], [rms * activation(gate)]) < 1e-14
    assert worst([norm.l2norm(x, eps=0.0)], [F.normalize(x, dim=-1)]) < 1e-14


def test_prenorm_keeps_the_sum_in_fp32_when_asked_or_when_the_residual_is():
    x, weight = torch.randn(3, 8).bfloat16(), torch.ones(8).bfloat16()
    _, carried = norm.norm(x, weight, None, prenorm=True)
    assert carried.dtype == torch.bfloat16
    y, carried = norm.norm(x, weight, None, prenorm=True, residual_in_fp32=True)
    assert (y.dtype, carried.dtype) == (torch.bfloat16, torch.float32)
    residual = torch.randn(3, 8)
    _, carried = norm.norm(x, weight, None, residual, prenorm=True)
    assert torch.equal(carried, x.float() + residual)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding_is_a_complex_rotation_by_position(interleaved):
    x, angle = torch.randn(2, 9, 3, 12, dtype=torch.float64), torch.rand(20, 4, dtype=torch.float64)
    a, b = (x[..., 0:8:2], x[..., 1:8:2]) if interleaved else (x[..., :4], x[..., 4:8])

    def rotate(position):
        turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)[position][..., None, :]
        parts = torch.stack([turned.real, turned.imag], -1 if interleaved else -2).flatten(-2)
        return torch.cat([parts, x[..., 8:]], -1)

    def found(**options):
        return attention.rotary_embedding(x, angle.cos(), angle.sin(), interleaved, **options)

    steps = torch.arange(9)
    assert worst([found()], [rotate(steps)]) < 1e-14
    assert worst([found(seqlen_offsets=5)], [rotate(steps + 5)]) < 1e-14
    offsets = torch.tensor([2, 7])
    assert worst([found(seqlen_offsets=offsets)], [rotate(steps + offsets[:, None])]) < 1e-14
    packed = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])
    assert worst([found(cu_seqlens=torch.tensor([0, 4, 9]))], [rotate(packed)]) < 1e-14


def attention_by_hand(q, k, v, causal, left, right):
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    for i in range(q.shape[1]):
        at = i + k.shape[1] - q.shape[1]
        for j in range(k.shape[1]):
            if (causal and j > at) or (left >= 0 and j < at - left) or (right >= 0 and j > at + right):
                scores[:, :, i, j] = -torch.inf
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


@pytest.mark.parametrize("queries, causal, window", [
    (9, True, (-1, -1)), (9, False, (-1, -1)), (9, True, (2, 0)), (9, False, (2, 1)), (9, False, (-1, 3)),
    (4, True, (-1, -1)), (1, True, (3, 0)),
])  # fmt: skip
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_attention_reference_equals_explicit_softmax(queries, causal, window, kv_heads):
    q, k, v = (torch.randn(2, n, h, 8, dtype=torch.float64) for n, h in ((queries, 4), (9, kv_heads), (9, kv_heads)))
    o = attention.flash_attn_func(q, k, v, causal=causal, window_size=window)
    assert worst([o], [attention_by_hand(q, k, v, causal, *window)]) < 1e-14


def test_packed_attention_equals_separate_documents():
    q, k, v = (torch.randn(12, 4, 8, dtype=torch.float64) for _ in range(3))
    cu_seqlens = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    packed = attention.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 6, 6, causal=True, window_size=(3, 0))
    separate = [attention_by_hand(*(x[None, a:b] for x in (q, k, v)), True, 3, 0) for a, b in ((0, 5), (5, 6), (6, 12))]
    assert worst([packed[None]], [torch.cat(separate, 1)]) < 1e-14
    whole = attention_by_hand(q[None], k[None], v[None], True, 3, 0)
    assert worst([packed[None]], [whole]) > 0.1


def test_enable_twice_changes_nothing_and_reaches_every_module():
    from fla.modules.activations.ops import ACT2FN
    from fla.ops import gla

    before = gla.chunk_gla
    reference.enable()
    assert gla.chunk_gla is before
    assert sys.modules["fla.layers.gla"].chunk_gla is before
    assert torch.equal(ACT2FN["swish"](torch.ones(2)), F.silu(torch.ones(2)))


def test_other_devices_get_the_original():
    calls = []
    served = reference._on_cpu(lambda x: "reference", lambda x, **kwargs: calls.append(kwargs) or "original")
    assert served(torch.ones(1)) == served(x=torch.ones(1)) == "reference"
    assert served(torch.ones(1, device="meta"), anything=1) == "original" and calls == [{"anything": 1}]


def test_options_without_a_reference_are_rejected_by_name():
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.ops.gla import fused_recurrent_gla

    q, k, v, g = gla_inputs(5)
    for name, value in (("reverse", True), ("gv", v)):
        with pytest.raises(NotImplementedError, match=f"fused_recurrent_gla: {name} is not supported on CPU"):
            fused_recurrent_gla(q, k, v, g, **{name: value})
    with pytest.raises(NotImplementedError, match="cp_context"):
        causal_conv1d(torch.ones(1, 4, 6), torch.ones(6, 4), cp_context=object())
    plain, _ = fused_recurrent_gla(q, k, v, g)
    assert torch.equal(fused_recurrent_gla(q, k, v, g, reverse=False, gv=None)[0], plain)
