"""The references of retention, linear attention, HGRN, slot attention and LightNet.

Every operation is compared in float64 with its recurrence written out token by token.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from flame.models import reference
from flame.models.reference.gsa import gated_slot_attention, lightnet
from flame.models.reference.linear_attention import hgrn, linear_attention, simple_gla
from tests.models.kernels import outputs_and_gradients, worst

reference.enable()
from fla.ops import gsa, hgrn as fla_hgrn, lightnet as fla_lightnet, linear_attn, retention, simple_gla as fla_simple  # noqa: E402, I001

BATCH, HEADS, K, V = 2, 2, 5, 7
BOUNDS = [0, 3, 70, 71, 150]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# The recurrences ------------------------------------------------------------------------------------------------------


def linear_step_by_step(q, k, v, g, state, scale=K**-0.5):
    """g (batch, seq, heads) or (batch, seq, heads, K)."""
    outputs = []
    for t in range(q.shape[1]):
        decay = g[:, t].exp()
        state = (decay[..., None] if decay.ndim == 3 else decay[..., None, None]) * state
        state = state + k[:, t][..., None] * v[:, t][..., None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state))
    return torch.stack(outputs, 1), state


def simple_by_hand(q, k, v, g, state):
    return linear_step_by_step(q, k, v, g, state)


def retention_by_hand(q, k, v, state):
    decay = torch.tensor([1 - 2**-5, 1 - 2**-6], dtype=torch.float64).log()
    return linear_step_by_step(q, k, v, decay.expand(q.shape[:3]), state)


def normalized_by_hand(q, k, v, state, keys):
    o, state = linear_step_by_step(q, k, v, torch.zeros_like(q[..., 0]), state)
    total, divisors = keys[:, 0], []
    for t in range(q.shape[1]):
        total = total + k[:, t]
        divisors.append((q[:, t] * total).sum(-1, keepdim=True) * K**-0.5)
    return o / (torch.stack(divisors, 1) + 1e-10), state, total[:, None]


def hgrn_by_hand(x, g, state):
    outputs = []
    for t in range(x.shape[1]):
        state = g[:, t].exp() * state + x[:, t]
        outputs.append(state)
    return torch.stack(outputs, 1), state


def slots_by_hand(q, k, v, s, g, keys, values):
    groups, outputs = q.shape[2] // k.shape[2], []
    for t in range(q.shape[1]):
        keys = keys * g[:, t].exp()[:, :, None] + k[:, t][..., None] * s[:, t][:, :, None]
        values = values * g[:, t].exp()[..., None] + s[:, t][..., None] * v[:, t][:, :, None]
        read_keys, read_values = (x.repeat_interleave(groups, 1) for x in (keys, values))
        weights = torch.einsum("bhk,bhkm->bhm", q[:, t] * K**-0.5, read_keys).softmax(-1)
        outputs.append(torch.einsum("bhm,bhmv->bhv", weights, read_values))
    return torch.stack(outputs, 1), keys, values


def lightnet_by_hand(q, k, v, state, z):
    """Every token anew from all before it: no gate is ever formed."""
    outputs, begun = [], z[:, 0].exp()
    for t in range(q.shape[1]):
        weights = k[:, : t + 1].exp()
        written = torch.einsum("bthk,bthv->bhkv", weights, v[:, : t + 1]) + begun[..., None] * state
        total = weights.sum(1) + begun
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * K**-0.5, written / total[..., None]))
    return torch.stack(outputs, 1), written / total[..., None], total.log()[:, None]


# What is compared: our function and the recurrence, both from inputs and states to the output and the new states; then
# the shapes of the inputs after (batch, seq) and of the states after (sequences,). An input g is a log decay.


def one_state(op):
    return lambda *inputs, state=None, **options: op(*inputs, initial_state=state and state[0], **options)


def two_states(op):
    def call(*inputs, state=None, **options):
        o, pair = op(*inputs, initial_state=state and tuple(state), **options)
        return (o, *pair)

    return call


def normalized(q, k, v, **options):
    return linear_attention(q, k, v, normalize=True, **options)


def retained(q, k, v, **options):
    return retention.chunk_retention(q, k, v, **options)


HEAD = {"q": (HEADS, K), "k": (HEADS, K), "v": (HEADS, V)}
STATE = {"S": (HEADS, K, V)}
SLOTS = {"s": (HEADS, 6), "g": (HEADS, 6)}
SLOT_STATES = {"S": (HEADS, K, 6), "S2": (HEADS, 6, V)}
OPS = {
    "simple gla": (one_state(simple_gla), simple_by_hand, {**HEAD, "g": (HEADS,)}, STATE),
    "retention": (one_state(retained), retention_by_hand, HEAD, STATE),
    "normalized linear attention": (two_states(normalized), normalized_by_hand, HEAD, {**STATE, "z": (1, HEADS, K)}),
    "hgrn": (one_state(hgrn), hgrn_by_hand, {"x": (9,), "g": (9,)}, {"h": (9,)}),
    "slot attention": (two_states(gated_slot_attention), slots_by_hand, {**HEAD, **SLOTS}, SLOT_STATES),
    "grouped slot attention": (
        two_states(gated_slot_attention), slots_by_hand, {**HEAD, "q": (2 * HEADS, K), **SLOTS}, SLOT_STATES
    ),
    "lightnet": (two_states(lightnet), lightnet_by_hand, HEAD, {**STATE, "z": (1, HEADS, K)}),
}  # fmt: skip


def draw(name, length, batch=BATCH, sequences=BATCH, dtype=torch.float64):
    """Inputs and states by name; log decays are negative, and what the normalized attention divides by is positive."""
    _, _, inputs, states = OPS[name]
    rng = torch.Generator().manual_seed(length)
    shapes = {n: (batch, length, *s) for n, s in inputs.items()} | {n: (sequences, *s) for n, s in states.items()}
    drawn = {n: torch.randn(shape, generator=rng, dtype=torch.float64) for n, shape in shapes.items()}
    if "g" in drawn:
        drawn["g"] = F.logsigmoid(drawn["g"])
    if name.startswith("normalized"):
        drawn |= {n: drawn[n].exp() for n in ("q", "k", "z")}
    return {n: x.to(dtype).requires_grad_() for n, x in drawn.items()}


def split(name, given):
    """The inputs and the states among the values of `draw`."""
    count = len(OPS[name][2])
    values = list(given.values())
    return values[:count], values[count:]


def reference_of(name, **options):
    def call(**given):
        inputs, states = split(name, given)
        return OPS[name][0](*inputs, state=states, output_final_state=True, **options)

    return call


def recurrence_of(name):
    return lambda **given: OPS[name][1](*given.values())


@pytest.mark.parametrize("length", [1, 2, 63, 65, 150])
@pytest.mark.parametrize("name", OPS)
def test_an_operation_and_all_its_gradients_equal_its_recurrence(name, length):
    given = draw(name, length)
    found = outputs_and_gradients(reference_of(name), given)
    expected = outputs_and_gradients(recurrence_of(name), given)
    assert len(expected) == len(given) + len(OPS[name][3]) + 1
    # retention's decays are fp32 whatever the model's precision
    assert worst(found, expected) < (1e-6 if name == "retention" else 1e-11)
    in_fp32 = {n: x.detach().float().requires_grad_() for n, x in given.items()}
    assert worst(outputs_and_gradients(reference_of(name), in_fp32), expected) < 2e-5


def begun(name, sequences):
    """States as if nothing had come before."""
    return {n: torch.zeros(sequences, *s, dtype=torch.float64) for n, s in OPS[name][3].items()} | (
        {"z": torch.full((sequences, 1, HEADS, K), -torch.inf, dtype=torch.float64)} if name == "lightnet" else {}
    )


@pytest.mark.parametrize("name", OPS)
def test_packed_documents_equal_separate_documents(name):
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    documents, inputs = len(BOUNDS) - 1, OPS[name][2]
    given = draw(name, BOUNDS[-1], batch=1, sequences=documents)

    def separately(**given):
        pieces = [
            OPS[name][1](*(x[:, a:b] if n in inputs else x[i : i + 1] for n, x in given.items()))
            for i, (a, b) in enumerate(itertools.pairwise(BOUNDS))
        ]
        o, *states = zip(*pieces, strict=True)
        return torch.cat(o, 1), *(torch.cat(x) for x in states)

    found = outputs_and_gradients(reference_of(name, cu_seqlens=cu_seqlens), given)
    assert worst(found, outputs_and_gradients(separately, given)) < (1e-6 if name == "retention" else 1e-11)

    # what training asks for: no states, and so one pass over the whole row
    def packed(**given):
        return OPS[name][0](*given.values(), cu_seqlens=cu_seqlens)[0]

    def alone(**given):
        return separately(**given, **begun(name, documents))[0]

    stateless = {n: given[n] for n in inputs}
    expected = outputs_and_gradients(alone, stateless)
    assert worst(outputs_and_gradients(packed, stateless), expected) < (1e-6 if name == "retention" else 1e-11)
    leaking = OPS[name][0](*stateless.values())[0]
    assert worst([leaking], expected[:1]) > 0.05  # unpacked, documents do leak


@pytest.mark.parametrize("name", ["simple gla", "hgrn", "slot attention"])
def test_an_operation_stays_exact_when_decays_of_minus_fifty_stand_among_weak_ones(name):
    given = draw(name, 200)
    mixed = torch.where(torch.rand(given["g"].shape) < 0.1, -50.0, given["g"].detach() / 16)
    for g in (mixed, torch.full_like(mixed, -50.0), torch.full_like(mixed, -200.0)):
        given["g"] = g.requires_grad_()
        expected = outputs_and_gradients(recurrence_of(name), given)
        in_fp32 = {n: x.detach().float().requires_grad_() for n, x in given.items()}
        found = outputs_and_gradients(reference_of(name), in_fp32)
        assert all(x.isfinite().all() for x in found)
        used = [i for i, x in enumerate(expected) if x.abs().max() > 1e-20]  # the rest is below fp32
        assert worst([found[i] for i in used], [expected[i] for i in used]) < 2e-5


def test_lightnet_stays_exact_when_keys_are_far_apart():
    given = draw("lightnet", 200)
    given["k"] = (given["k"].detach() * 30).requires_grad_()
    in_fp32 = {n: x.detach().float().requires_grad_() for n, x in given.items()}
    found = outputs_and_gradients(reference_of("lightnet"), in_fp32)
    assert worst(found, outputs_and_gradients(recurrence_of("lightnet"), given)) < 1e-4


def test_scale_and_state_layout_are_honoured():
    given = draw("simple gla", 70)
    q, k, v, g, state = given.values()
    o, final = simple_gla(q, k, v, g, scale=0.5, initial_state=state.mT, output_final_state=True, state_v_first=True)
    expected, state = linear_step_by_step(q, k, v, g, state, scale=0.5)
    assert worst([o, final], [expected, state.mT]) < 1e-11
    assert simple_gla(q, k, v, g)[1] is None and linear_attention(q, k, v, normalize=True)[1] == (None, None)


def test_slots_without_gates_forget_like_a_running_softmax():
    given = draw("slot attention", 70)
    q, k, v, s = (given[n] for n in "qkvs")
    o, _ = gated_slot_attention(q, k, v, s)
    z = s.logcumsumexp(1)
    before = torch.cat([z[:, :1], z[:, :-1]], 1)
    states = begun("slot attention", BATCH).values()
    assert worst([o], slots_by_hand(q, k, v, (s - z).exp(), before - z, *states)[:1]) < 1e-11


# The seam -------------------------------------------------------------------------------------------------------------


ENTRIES = {
    "chunk_simple_gla": (fla_simple.chunk_simple_gla, "qkvg", {}),
    "chunk_retention": (retention.chunk_retention, "qkv", {}),
    "fused_chunk_retention": (retention.fused_chunk_retention, "qkv", {}),
    "chunk_linear_attn": (linear_attn.chunk_linear_attn, "qkv", {"normalize": True}),
    "fused_chunk_linear_attn": (linear_attn.fused_chunk_linear_attn, "qkv", {"normalize": False}),
    "chunk_hgrn": (fla_hgrn.chunk_hgrn, "xg", {}),
    "chunk_gsa": (gsa.chunk_gsa, "qkvsg", {}),
    "chunk_lightnet": (fla_lightnet.chunk_lightnet, "qkv", {}),
}


def entry_inputs(name):
    like = {"chunk_hgrn": "hgrn", "chunk_gsa": "slot attention"}.get(name, "simple gla")
    return {n: x for n, x in draw(like, 9, dtype=torch.float32).items() if n in ENTRIES[name][1]}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_point_compiles_without_a_graph_break(name):
    entry, _, options = ENTRIES[name]
    call = lambda **inputs: entry(**inputs, **options)[0]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    given = entry_inputs(name)
    assert worst(outputs_and_gradients(compiled, given), outputs_and_gradients(call, given)) < 1e-5


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_point_computes_in_fp32_under_autocast(name):
    entry, _, options = ENTRIES[name]
    given = entry_inputs(name)
    expected = entry(**given, **options)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(entry(**given, **options)[0], expected)


def test_options_without_a_reference_are_rejected_by_name():
    given = entry_inputs("chunk_simple_gla")
    for entry in (fla_simple.fused_recurrent_simple_gla, linear_attn.fused_recurrent_linear_attn):
        with pytest.raises(NotImplementedError, match="reverse is not supported on CPU"):
            entry(given["q"], given["k"], given["v"], reverse=True)
    with pytest.raises(NotImplementedError, match="both g and g_gamma"):
        fla_simple.chunk_simple_gla(**given, g_gamma=torch.zeros(HEADS))
    with pytest.raises(NotImplementedError, match="output_attentions"):
        fla_simple.parallel_simple_gla(**given, output_attentions=True)
    with pytest.raises(NotImplementedError, match="checkpoint_level"):
        gsa.chunk_gsa(**entry_inputs("chunk_gsa"), checkpoint_level=1)
