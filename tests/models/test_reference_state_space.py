"""The state space and RWKV references against their recurrences, token by token in float64."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from flame.models import reference
from flame.models.reference import convolution, mamba, rwkv
from tests.models.kernels import gradients, worst

reference.enable()
from fla.layers import rwkv6, rwkv7  # noqa: E402
from fla.layers.mamba import Mamba  # noqa: E402
from fla.layers.mamba2 import Mamba2  # noqa: E402
from fla.ops.simple_gla.naive import naive_chunk_simple_gla  # noqa: E402

BATCH, HEADS, K, V = 2, 3, 5, 7
BOUNDS = [0, 3, 40, 41, 100]


def normal(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=rng)


# The definitions: inputs and the state in, outputs (batch, seq, ...) and the last state out -------------------------


def scan_steps(x, dt, A, B, C, state):
    outputs = []
    for t in range(x.shape[1]):
        state = (dt[:, t, :, None] * A).exp() * state + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    return torch.stack(outputs, 1), state


def duality_steps(x, dt, A, B, C, state):
    heads = [h * B.shape[2] // x.shape[2] for h in range(x.shape[2])]  # head -> its group
    outputs = []
    for t in range(x.shape[1]):
        write = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, heads, None]
        state = (dt[:, t] * A).exp()[..., None, None] * state + write
        outputs.append((state * C[:, t, heads, None]).sum(-1))
    return torch.stack(outputs, 1), state


def rwkv6_steps(r, k, v, w, u, state):
    outputs = []
    for t in range(r.shape[1]):
        write = k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((r[:, t, :, :, None] * 0.3 * (state + u[..., None] * write)).sum(-2))
        state = w[:, t, :, :, None].exp() * state + write
    return torch.stack(outputs, 1), state


def rwkv7_steps(r, w, k, v, a, b, state):
    outputs = []
    for t in range(r.shape[1]):
        removed = b[:, t, :, :, None] * (a[:, t, :, :, None] * state).sum(-2, keepdim=True)
        state = w[:, t, :, :, None].exp() * state + removed + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((r[:, t, :, :, None] * 0.3 * state).sum(-2))
    return torch.stack(outputs, 1), state


def rwkv7_decode_steps(r, w, k, v, kk, a, state):
    return rwkv7_steps(r, w, k, v, -kk, kk * a, state)


# What a test feeds them: a function of batch and length -------------------------------------------------------------


def scan_inputs(batch, length):
    x, dt = normal(batch, length, V), F.softplus(normal(batch, length, V, seed=1))
    return [x, dt, -normal(V, K).exp(), normal(batch, length, K), normal(batch, length, K, seed=1)]


def duality_inputs(batch, length):
    x, dt = normal(batch, length, 4, V), F.softplus(normal(batch, length, 4))
    return [x, dt, -normal(4).exp(), normal(batch, length, 2, K), normal(batch, length, 2, K, seed=1)]


def rwkv6_inputs(batch, length):
    r, k, w = (normal(batch, length, HEADS, K, seed=i) for i in range(3))
    return [r, k, normal(batch, length, HEADS, V), F.logsigmoid(w), normal(HEADS, K)]


def rwkv7_decode_inputs(batch, length):
    r, k, w, kk, a = (normal(batch, length, HEADS, K, seed=i) for i in range(5))
    v = normal(batch, length, HEADS, V)
    return [r, F.logsigmoid(w), k, v, F.normalize(kk, dim=-1), a.sigmoid()]


def rwkv7_inputs(batch, length):
    r, w, k, v, kk, a = rwkv7_decode_inputs(batch, length)
    return [r, w, k, v, -kk, kk * a]


RWKV = {"scale": 0.3, "output_final_state": True}
# name -> (reference, its options, definition, inputs, the shape of one state)
OPS = {
    "mamba": (mamba.selective_scan, {}, scan_steps, scan_inputs, (V, K)),
    "mamba2": (mamba.state_space_duality, {"output_final_state": True}, duality_steps, duality_inputs, (4, V, K)),
    "rwkv6": (rwkv.rwkv6, RWKV, rwkv6_steps, rwkv6_inputs, (HEADS, K, V)),
    "rwkv7": (rwkv.rwkv7, RWKV, rwkv7_steps, rwkv7_inputs, (HEADS, K, V)),
    "rwkv7 decode": (rwkv.rwkv7_decode, RWKV, rwkv7_decode_steps, rwkv7_decode_inputs, (HEADS, K, V)),
}
PACKED = ["rwkv6", "rwkv7", "rwkv7 decode"]


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 65, 100])
@pytest.mark.parametrize("name", OPS)
def test_an_op_and_all_its_gradients_equal_the_recurrence(name, length):
    op, options, steps, inputs, shape = OPS[name]
    given = [x.requires_grad_() for x in (*inputs(BATCH, length), normal(BATCH, *shape))]
    found = op(*given[:-1], initial_state=given[-1], **options)
    exact = [x.detach().double().requires_grad_() for x in given]
    expected = steps(*exact)
    assert worst(found, expected) < 2e-6
    assert worst(gradients(found, given), gradients(expected, exact)) < 1e-5
    wide = op(*exact[:-1], initial_state=exact[-1], **options)  # float64 stays float64
    assert worst(wide, expected) < 1e-13


@pytest.mark.parametrize("name", OPS)
def test_an_op_without_a_state_starts_from_zero(name):
    op, options, steps, inputs, shape = OPS[name]
    given = inputs(BATCH, 40)
    expected = steps(*(x.double() for x in given), torch.zeros(BATCH, *shape, dtype=torch.float64))
    assert worst(op(*given, **options), expected) < 2e-6


@pytest.mark.parametrize("name", OPS)
def test_an_op_stays_exact_when_decays_of_minus_a_thousand_stand_among_weak_ones(name):
    op, options, steps, inputs, shape = OPS[name]
    given = inputs(BATCH, 100)
    at = 3 if name == "rwkv6" else 1  # the log decays, or dt
    strong = torch.rand(given[at].shape, generator=torch.Generator().manual_seed(1)) < 0.1
    given[at] = torch.where(strong, math.copysign(1000.0, given[at].flatten()[0]), given[at] / 16)
    given = [x.requires_grad_() for x in given]
    found = op(*given, **options)
    exact = [x.detach().double().requires_grad_() for x in given]
    expected = steps(*exact, torch.zeros(BATCH, *shape, dtype=torch.float64))
    assert worst(found, expected) < 2e-6
    assert worst(gradients(found, given), gradients(expected, exact)) < 1e-5


def each_document_alone(name, given, states):
    _, _, steps, _, shape = OPS[name]
    alone = []
    for i, (a, b) in enumerate(itertools.pairwise(BOUNDS)):
        piece = [x[:, a:b] if x.ndim == 4 else x for x in given]  # the bonus of rwkv6 has no tokens
        zero = torch.zeros(1, *shape, dtype=torch.float64)
        alone.append(steps(*piece, zero if states is None else states[i : i + 1]))
    return torch.cat([o for o, _ in alone], 1), torch.cat([state for _, state in alone])


@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_and_their_gradients_equal_separate_documents(name):
    op, _, _, inputs, shape = OPS[name]
    given = [x.requires_grad_() for x in inputs(1, 100)]
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    packed, _ = op(*given, scale=0.3, cu_seqlens=cu_seqlens)
    exact = [x.detach().double().requires_grad_() for x in given]
    separate, _ = each_document_alone(name, exact, None)
    assert worst([packed], [separate]) < 2e-6
    assert worst(gradients([packed], given), gradients([separate], exact)) < 1e-5
    assert worst([op(*given, scale=0.3)[0]], [separate]) > 0.1  # unpacked, documents do leak
    states = normal(len(BOUNDS) - 1, *shape)
    found = op(*given, initial_state=states, cu_seqlens=cu_seqlens, **RWKV)
    assert worst(found, each_document_alone(name, exact, states.double())) < 2e-6


@pytest.mark.parametrize("name", PACKED)
def test_an_op_computes_in_fp32_under_autocast_and_returns_the_dtype_of_v(name):
    op, options, _, inputs, _ = OPS[name]
    given = [x.bfloat16() for x in inputs(BATCH, 70)]
    expected, _ = op(*(x.float() for x in given), **options)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = op(*given, **options)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(o, expected.bfloat16())


@pytest.mark.parametrize("name, dtype, bound", [("mamba", torch.float32, 0), ("mamba2", torch.bfloat16, 0.01)])
def test_a_state_space_op_computes_in_fp32_under_autocast(name, dtype, bound):
    op, options, _, inputs, _ = OPS[name]
    given = [x.bfloat16() for x in inputs(BATCH, 70)]
    with torch.autocast("cpu", torch.bfloat16):
        y, state = op(*given, **options)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    # Mamba 2's kernel takes dt x and gives y in the type of x: each is rounded once.
    assert worst([y, state], op(*(x.float() for x in given), **options)) <= bound


# The small operations ------------------------------------------------------------------------------------------------


def test_token_shift_hands_the_last_token_on():
    x, cache = normal(2, 9, 4), normal(2, 4)
    zero = torch.zeros(2, 1, 4)
    assert torch.equal(rwkv.token_shift(x), torch.cat([zero, x[:, :-1]], 1) - x)
    shifted, last = rwkv.token_shift(x, cache=cache, output_cache=True)
    assert torch.equal(shifted, torch.cat([cache[:, None], x[:, :-1]], 1) - x) and torch.equal(last, x[:, -1])
    halves = [rwkv.token_shift(x[:, :5], output_cache=True), rwkv.token_shift(x[:, 5:], cache=x[:, 4])]
    assert torch.equal(torch.cat([halves[0][0], halves[1]], 1), rwkv.token_shift(x))


def test_packed_token_shift_equals_separate_documents():
    x, cache, cu_seqlens = normal(1, 100, 4), normal(4, 4), torch.tensor(BOUNDS)
    pieces = [x[:, a:b] for a, b in itertools.pairwise(BOUNDS)]
    separate = torch.cat([rwkv.token_shift(piece) for piece in pieces], 1)
    assert torch.equal(rwkv.token_shift(x, cu_seqlens), separate)
    assert not torch.equal(rwkv.token_shift(x), separate)
    found = rwkv.token_shift(x, cu_seqlens, cache, output_cache=True)
    continued = [rwkv.token_shift(piece, cache=cache[i : i + 1]) for i, piece in enumerate(pieces)]
    assert torch.equal(found[0], torch.cat(continued, 1))
    assert torch.equal(found[1], torch.cat([piece[:, -1] for piece in pieces]))


def test_the_elementwise_operations_of_rwkv_equal_their_formulas():
    x, delta, weights = normal(2, 9, 6).double(), normal(2, 9, 6, seed=1).double(), normal(6, 6).double()
    expected = [x + delta * m for m in weights]
    assert worst(rwkv.mix_previous(x, delta, *weights), expected) < 1e-14
    assert rwkv.mix_previous(x, delta, *weights[:5])[5] is None
    assert worst([rwkv.update_key(x, delta, weights[0])], [x * (1 + (delta - 1) * weights[0])]) < 1e-14
    r, k, v = (t.unflatten(-1, (2, 3)) for t in (x, delta, x.flip(1)))
    u = weights[0].view(2, 3)
    bonus = torch.einsum("bthd,bthd,hd,bthe->bthe", r, k, u, v).flatten(2)
    assert worst([rwkv.correct_output(delta, r, k, u, v, x)], [(delta + bonus) * x]) < 1e-14
    assert torch.equal(rwkv.squared_relu(torch.tensor([-2.0, 0.0, 3.0])), torch.tensor([0.0, 0.0, 9.0]))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_the_gated_norm_of_mamba2_equals_torch_in_float64(groups, norm_before_gate):
    x, z, weight = normal(3, 8).double(), normal(3, 8, seed=1).double(), normal(8).double()
    options = {"eps": 1e-5, "group_size": 8 // groups, "norm_before_gate": norm_before_gate}
    y = x if norm_before_gate else x * F.silu(z)
    expected = F.rms_norm(y.unflatten(-1, (groups, -1)), (8 // groups,), eps=1e-5).flatten(-2) * weight
    expected = expected * F.silu(z) if norm_before_gate else expected
    assert worst([mamba.rms_norm_gated(x, weight, None, z, **options)], [expected]) < 1e-14


# The layers ----------------------------------------------------------------------------------------------------------


def layer_outputs(call, layer, x, **options):
    o = call(x, **options)[0]
    return [o, *gradients([o], [x, *layer.parameters()])]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("build, fallback", [
    (partial(Mamba, hidden_size=16, intermediate_size=32, state_size=4), Mamba.slow_forward),
    # One group: with more, fla's fallback lays the groups over the heads in another order than its own decoding does.
    (partial(Mamba2, hidden_size=16, head_dim=8, state_size=4, chunk_size=16), Mamba2.torch_forward),
    (partial(Mamba2, hidden_size=16, head_dim=8, state_size=4, D_has_hdim=True, rmsnorm=False), Mamba2.torch_forward),
    (partial(Mamba2, hidden_size=16, head_dim=8, state_size=4, dt_limit=(0.01, 0.02)), Mamba2.torch_forward),
])  # fmt: skip
def test_a_layer_and_its_gradients_equal_the_fallback_of_fla(build, fallback, masked):
    # The kernels of mamba_ssm cannot run here: fla's fallback stands for the layer, the recurrence for the kernels.
    torch.manual_seed(0)  # of the layer's weights
    layer, x = build().double(), normal(2, 50, 16).double().requires_grad_()
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[0, :7] = 0
    options = {"attention_mask": mask} if masked else {}
    expected = layer_outputs(lambda x, **options: fallback(layer, x, **options), layer, x, **options)
    assert worst(layer_outputs(layer, layer, x, **options), expected) < 1e-6  # the fallbacks go through fp32


def decode(layer, x):
    """The output of fla's Mamba 2 when it reads one token after the other."""
    last = {"conv_state": x.new_zeros(len(x), layer.conv_dim, 4), "recurrent_state": x.new_zeros(len(x), 4, 8, 4)}
    outputs = []
    for token in x.split(1, 1):
        o, last["conv_state"], last["recurrent_state"] = layer.torch_forward(token, last)
        outputs.append(o)
    return torch.cat(outputs, 1)


def test_two_groups_of_mamba2_are_shared_as_in_the_decoding_of_fla():
    layer, x = Mamba2(hidden_size=16, head_dim=8, state_size=4, n_groups=2, chunk_size=16).double(), normal(2, 9, 16)
    with torch.no_grad():
        expected = decode(layer, x.double())
        assert worst([layer(x.double())[0]], [expected]) < 1e-6
        assert worst([layer.torch_forward(x.double())[0]], [expected]) > 1e-3  # why flame does not leave it to fla


@pytest.mark.parametrize("groups", [1, 4])
def test_on_a_gpu_mamba2_is_fed_to_simple_gla(groups, monkeypatch):
    devices = []

    def scan(q, k, v, g, scale, initial_state, output_final_state, state_v_first):
        devices.append(q.device.type)
        return naive_chunk_simple_gla(q, k, v, g, initial_state, output_final_state, 64, scale)

    monkeypatch.setattr("fla.ops.simple_gla.chunk_simple_gla", scan)
    monkeypatch.setattr("fla.modules.causal_conv1d.causal_conv1d", convolution.causal_conv1d)
    monkeypatch.setattr("fla.modules.norm.layernorm_gated.rmsnorm_fn", mamba.rms_norm_gated)
    torch.manual_seed(0)
    layer, x = Mamba2(hidden_size=16, head_dim=8, state_size=4, n_groups=groups), normal(2, 70, 16)
    found, expected = (
        [y.square().mean(), *gradients([y], [*layer.parameters()])] for y in (layer(x)[0], decode(layer, x))
    )
    norms = [torch.stack([g.norm() for g in grads]).norm() for grads in (found[1:], expected[1:])]
    assert worst([found[0], norms[0]], [expected[0], norms[1]]) < 1e-6
    assert worst(found, expected) < 1e-5
    assert layer.to("meta")(x.to("meta"))[0].shape == x.shape  # a device on which nothing is computed, like a GPU here
    assert devices == ["cpu", "meta"]


def test_options_without_a_reference_are_rejected_by_name():
    r, k, v, w, u = rwkv6_inputs(1, 5)
    with pytest.raises(NotImplementedError, match="fused_recurrent_rwkv6: reverse is not supported on CPU"):
        rwkv6.fused_recurrent_rwkv6(r, k, v, w, u, reverse=True)
    with pytest.raises(NotImplementedError, match="chunk_rwkv7: cp_context is not supported on CPU"):
        rwkv7.chunk_rwkv7(*rwkv7_inputs(1, 5), cp_context=object())


def test_an_entry_point_that_fla_hides_from_the_compiler_compiles_on_a_cpu():
    x = normal(2, 9, 4)
    compiled = torch.compile(lambda x: rwkv6.token_shift(x) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), rwkv.token_shift(x) * 2)
