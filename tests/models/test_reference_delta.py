"""The delta-rule references against the recurrence written out token by token in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from flame.models import reference
from flame.models.reference import delta_rule
from tests.models.kernels import compare, outputs_and_gradients

reference.enable()

H, K, V = 2, 5, 7
BOUNDS = [0, 3, 40, 41, 100]


def recurrence(q, k, v, decay, beta, state, steps=1):
    """o and the last state; each token decays the state, writes `steps` pairs of k and v, then reads with q."""
    outputs = []
    for t in range(q.shape[1]):
        state = decay[:, t, :, :, None] * state
        for i in range(t * steps, (t + 1) * steps):
            error = v[:, i] - torch.einsum("bhk,bhkv->bhv", k[:, i], state)
            state = state + torch.einsum("bh,bhk,bhv->bhkv", beta[:, i], k[:, i], error)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def delta(q, k, v, beta, initial_state):
    return recurrence(q * 0.3, k, v, torch.ones_like(beta)[..., None], beta, initial_state)


def unit_delta(q, k, v, beta, initial_state):
    return recurrence(unit(q) * K**-0.5, unit(k), v, torch.ones_like(beta)[..., None], beta, initial_state)


def grouped_values(q, k, v, decay, beta, initial_state):
    q, k = (unit(x).repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    o, state = recurrence(q * K**-0.5, k, v, decay, beta, initial_state.mT)
    return o, state.mT


def gated(q, k, v, g, beta, A_log, dt_bias, initial_state):
    decay = (-A_log.exp() * F.softplus(g + dt_bias)).exp()[..., None]
    return grouped_values(q, k, v, decay, 2 * beta.sigmoid(), initial_state)


def kimi(q, k, v, g, beta, A_log, dt_bias, initial_state):
    decay = (-A_log.exp()[:, None] * F.softplus(g + dt_bias.view(-1, K))).exp()
    return grouped_values(q, k, v, decay, 2 * beta.sigmoid(), initial_state)


def kimi_bounded(q, k, v, g, beta, A_log, dt_bias, initial_state):
    decay = (-3.0 * (A_log.exp()[:, None] * (g + dt_bias.view(-1, K))).sigmoid()).exp()
    return grouped_values(q, k, v, decay, beta.sigmoid(), initial_state)


def product(q, k, v, g, beta, initial_state):
    return recurrence(unit(q) * K**-0.5, unit(k), v, g.exp()[..., None], beta, initial_state, steps=3)


IN_KERNEL = {
    "use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True,
    "state_v_first": True, "output_final_state": True,
}  # fmt: skip
PLAIN = {"output_final_state": True}
UNIT = {**PLAIN, "use_qk_l2norm_in_kernel": True}
CASES = {  # the recurrence, our reference, its options
    "delta_rule": (delta, delta_rule.delta_rule, {**PLAIN, "scale": 0.3}),
    "delta_rule of unit keys": (unit_delta, delta_rule.delta_rule, UNIT),
    "gated_delta_rule": (gated, delta_rule.gated_delta_rule, {**IN_KERNEL, "allow_neg_eigval": True}),
    "kda": (kimi, delta_rule.kimi_delta_rule, {**IN_KERNEL, "allow_neg_eigval": True}),
    "kda with a lower bound": (
        kimi_bounded, delta_rule.kimi_delta_rule, {**IN_KERNEL, "safe_gate": True, "lower_bound": -3.0}
    ),
    "gated_delta_product": (product, delta_rule.gated_delta_product, {**UNIT, "num_householder": 3}),
}  # fmt: skip


def case(name, length, sequences=2, batch=2):
    """The recurrence, our reference with its options, and inputs for both in float64."""
    exact, served, options = CASES[name]
    rng = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    steps = options.get("num_householder", 1)
    values = 2 * H if "state_v_first" in options else H
    inputs = {
        "q": normal(batch, length, H, K),
        "k": normal(batch, length * steps, H, K) / 2,
        "v": normal(batch, length * steps, values, V),
        "beta": normal(batch, length * steps, values).sigmoid(),
        "initial_state": normal(sequences, values, K, V),
    }
    if steps > 1:
        inputs["g"] = F.logsigmoid(normal(batch, length, H))
    elif values > H:
        channels = (K,) if "kda" in name else ()
        inputs["g"] = normal(batch, length, values, *channels)
        inputs |= {"A_log": normal(values), "dt_bias": normal(values * math.prod(channels))}
        inputs["initial_state"] = inputs["initial_state"].mT
    for x in inputs.values():
        x.requires_grad_()
    return exact, lambda **inputs: served(**inputs, **options), inputs


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 100])
@pytest.mark.parametrize("name", CASES)
def test_outputs_states_and_all_gradients_equal_the_recurrence(name, length):
    assert compare({name: case(name, length)})[name] < 1e-11


def each_document(op):
    """`op` on every document of BOUNDS alone, the results put together."""

    def call(initial_state, **inputs):
        length, results = inputs["q"].shape[1], []
        for i, (a, b) in enumerate(itertools.pairwise(BOUNDS)):
            steps = {n: x.shape[1] // length for n, x in inputs.items() if x.ndim > 2}
            cut = {n: x[:, a * steps[n] : b * steps[n]] if n in steps else x for n, x in inputs.items()}
            results.append(op(**cut, initial_state=initial_state[i : i + 1]))
        o, states = zip(*results, strict=True)
        return torch.cat(o, 1), torch.cat(states)

    return call


@pytest.mark.parametrize("name", CASES)
def test_packed_documents_with_states_equal_separate_documents(name):
    exact, served, inputs = case(name, BOUNDS[-1], sequences=len(BOUNDS) - 1, batch=1)
    packed = lambda **inputs: served(**inputs, cu_seqlens=torch.tensor(BOUNDS))
    assert compare({name: (each_document(exact), packed, inputs)})[name] < 1e-11


@pytest.mark.parametrize("name", CASES)
def test_packed_documents_without_states_equal_separate_documents_and_leak_without_bounds(name):
    exact, served, options = CASES[name]
    _, _, inputs = case(name, BOUNDS[-1], batch=1)
    zero = torch.zeros_like(inputs.pop("initial_state"))[:1].expand(len(BOUNDS) - 1, -1, -1, -1)
    options = {**options, "output_final_state": False}
    separate = lambda **inputs: each_document(exact)(zero, **inputs)[0]
    packed = lambda **inputs: served(**inputs, **options, cu_seqlens=torch.tensor(BOUNDS))
    unpacked = lambda **inputs: served(**inputs, **options)
    errors = compare({"packed": (separate, packed, inputs), "unpacked": (separate, unpacked, inputs)})
    assert errors["packed"] < 1e-11
    assert errors["unpacked"] > 0.05


@pytest.mark.parametrize("channels", [1, K])
def test_fp32_stays_exact_when_decays_of_minus_fifty_stand_among_weak_ones(channels):
    rng = torch.Generator().manual_seed(0)
    _, _, inputs = case("gated_delta_rule", 150)
    weak = F.logsigmoid(torch.randn(2, 150, 2 * H, channels, generator=rng)) / 16
    g = torch.where(torch.rand(weak.shape, generator=rng) < 0.1, torch.tensor(-50.0), weak)
    names = ("q", "k", "v", "beta", "initial_state")
    inputs = {n: inputs[n].detach().float().requires_grad_() for n in names} | {"g": g.requires_grad_()}
    op = delta_rule.gated_delta_rule if channels == 1 else delta_rule.kimi_delta_rule

    def served(g, **inputs):
        g = g.squeeze(-1) if channels == 1 else g
        return op(**inputs, g=g, state_v_first=True, output_final_state=True, use_qk_l2norm_in_kernel=True)

    def exact(g, **inputs):
        return grouped_values(**inputs, decay=g.exp())

    doubles = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    found, expected = outputs_and_gradients(served, inputs), outputs_and_gradients(exact, doubles)
    assert all((a - b).abs().max() < 5e-6 * b.abs().max() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_under_autocast_it_computes_in_fp32_and_returns_the_dtype_of_v(name):
    _, served, inputs = case(name, 70)
    halves = {n: x.detach().bfloat16() for n, x in inputs.items()}
    expected, _ = served(**{n: x.float() for n, x in halves.items()})
    with torch.autocast("cpu", torch.bfloat16):
        o, state = served(**halves)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(o, expected.bfloat16())


@pytest.mark.parametrize(
    "name", ["kda", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "kda")]
)
def test_it_compiles_without_a_graph_break(name):
    _, served, inputs = case(name, 40)
    torch.compiler.reset()
    compiled = torch.compile(served, fullgraph=True, backend="aot_eager")
    assert compare({name: (served, compiled, inputs)})[name] < 1e-12


def test_what_the_references_cannot_do_is_rejected():
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    from fla.ops.kda import chunk_kda

    q, k, v, beta = torch.ones(1, 3, H, K), torch.ones(1, 3, H, K), torch.ones(1, 3, H, V), torch.ones(1, 3, H)
    with pytest.raises(NotImplementedError, match="fused_recurrent_gated_delta_rule: gv is not supported on CPU"):
        fused_recurrent_gated_delta_rule(q, k, v, beta=beta, gv=v)
    with pytest.raises(NotImplementedError, match="cp_context"):
        chunk_gated_delta_rule(q, k, v, beta, beta=beta, cp_context=object())
    with pytest.raises(NotImplementedError, match="a beta for each value channel"):
        delta_rule.delta_rule(q, k, v, v)
    with pytest.raises(ValueError, match="allow_neg_eigval needs use_beta_sigmoid_in_kernel"):
        chunk_gated_delta_rule(q, k, v, beta, beta=beta, allow_neg_eigval=True)
    for bound in (None, -6.0, 0.0):
        with pytest.raises(ValueError, match="safe_gate needs a lower_bound"):
            chunk_kda(q, k, v, q, beta, safe_gate=True, use_gate_in_kernel=True, lower_bound=bound)
