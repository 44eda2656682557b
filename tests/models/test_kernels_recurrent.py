"""The references of retention, linear attention, HGRN, slot attention and LightNet against fla's Triton kernels, fp32.

`pytest -m slow` runs this file again as a script, because the interpreter has to be on before fla is imported.
"""

import functools
import json

import pytest
import torch
import torch.nn.functional as F

from tests.models.kernels import compare, run

T = 70  # up to 64 tokens fla's layers use other kernels
CU_SEQLENS = [0, 3, 68, 70]


def normal(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=rng).requires_grad_()


def decays(*shape):
    return (F.logsigmoid(normal(*shape, seed=3).detach()) / 4).requires_grad_()


def linear_inputs(batch=2, positive=False, **options):
    q, k, v = normal(batch, T, 2, 16), normal(batch, T, 2, 16, seed=1), normal(batch, T, 2, 32)
    if positive:  # a divisor near zero would only measure rounding
        q, k = (x.detach().exp().requires_grad_() for x in (q, k))
    return {"q": q, "k": k, "v": v, **options}


def hgrn_inputs(batch=2, **options):
    return {"x": normal(batch, T, 40), "g": decays(batch, T, 40), **options}


def slot_inputs(batch=2, heads=2, **options):
    gated = {"s": normal(batch, T, 2, 16, seed=2), "g": decays(batch, T, 2, 16)}
    return {**linear_inputs(batch), "q": normal(batch, T, heads, 16), **gated, **options}


def packed(inputs, **options):
    return inputs(1, cu_seqlens=torch.tensor(CU_SEQLENS), **options)


def flat(function):
    """A state that is a pair goes in as two arguments and comes out as two more outputs."""

    def call(*args, first_state=None, second_state=None, **kwargs):
        if first_state is not None:
            kwargs["initial_state"] = (first_state, second_state)
        found = function(*args, **kwargs)
        return tuple(y for x in found for y in (x if isinstance(x, (tuple, list)) else (x,)))

    return call


def without_states(function):
    """Some kernels return half of a state that nobody asked for."""
    return lambda *args, **kwargs: function(*args, **kwargs)[0]


def without_gradient_of_states(function):
    """chunk_hgrn's backward passes no gradient into or out of its states."""

    def call(*args, **kwargs):
        o, state = function(*args, **kwargs)
        return o, state if state is None else state.detach()

    return call


def forms(name, kernel, reference, inputs, states, packed_states):
    """One kernel four times: plain and packed, each without and with states."""
    both, outputs = [[wrap(f) for f in (kernel, reference)] for wrap in (flat, without_states)]
    final = {"output_final_state": True}
    return {
        name: (*outputs, inputs()),
        f"{name} with states": (*both, inputs(**states, **final)),
        f"{name} packed": (*outputs, packed(inputs)),
        f"{name} packed with states": (*both, packed(inputs, **packed_states, **final)),
    }


def cases():
    """name -> (fla's kernel, our reference, inputs); called in the interpreter's process only."""
    import inspect
    from types import SimpleNamespace

    import triton.language as tl
    from fla.modules.activations import ops as activation
    from fla.modules.norm import fused_norm_gate, layernorm
    from fla.ops import gsa, hgrn, lightnet, linear_attn, retention, simple_gla, utils
    from fla.ops.gsa.gate import fused_additive_gate

    from flame.models.reference import gsa as slot
    from flame.models.reference import linear_attention as linear
    from flame.models.reference import norm

    # the interpreter has no libdevice
    inspect.getmodule(utils.op.logaddexp.fn).tldevice = SimpleNamespace(log1p=lambda x: tl.log(1 + x))

    state, state3 = normal(2, 2, 16, 32), normal(3, 2, 16, 32)
    one, three = {"initial_state": state}, {"initial_state": state3}
    scalar = {"g": decays(2, T, 2)}
    table = {
        "simple gla scaled": (
            simple_gla.chunk_simple_gla, linear.simple_gla, linear_inputs(**scalar, scale=0.3)
        ),
        "simple gla parallel": (simple_gla.parallel_simple_gla, linear.simple_gla, linear_inputs(**scalar)),
        "simple gla state with V first": (simple_gla.chunk_simple_gla, linear.simple_gla, linear_inputs(
            **scalar, initial_state=normal(2, 2, 32, 16), output_final_state=True, state_v_first=True
        )),
        "simple gla recurrent": (simple_gla.fused_recurrent_simple_gla, linear.simple_gla, linear_inputs(**scalar)),
        "simple gla fused chunk": (simple_gla.fused_chunk_simple_gla, linear.simple_gla, linear_inputs(**scalar)),
        "gsa with grouped keys": (
            flat(gsa.chunk_gsa), flat(slot.gated_slot_attention), slot_inputs(heads=4, output_final_state=True)
        ),
        "gsa without gates": (flat(gsa.chunk_gsa), flat(slot.gated_slot_attention), slot_inputs(g=None)),
        "gsa without gates packed": (
            flat(gsa.chunk_gsa), flat(slot.gated_slot_attention), packed(slot_inputs, g=None)
        ),
        "additive gate": (fused_additive_gate, slot.additive_gate, {
            "x": normal(2, T, 2, 16), "initial_state": normal(2, 1, 2, 16)
        }),
        "additive gate packed": (fused_additive_gate, slot.additive_gate, {
            "x": normal(1, T, 2, 16), "initial_state": normal(3, 1, 2, 16), "cu_seqlens": torch.tensor(CU_SEQLENS)
        }),
        "rms_norm_linear": (
            layernorm.rms_norm_linear, functools.partial(norm.norm_linear, is_rms_norm=True),
            {"x": normal(2, T, 32), "norm_weight": normal(32), "norm_bias": None, "linear_weight": normal(8, 32),
             "linear_bias": normal(8), "residual": normal(2, T, 32, seed=2), "prenorm": True},
        ),
        "group_norm_linear": (
            layernorm.group_norm_linear, norm.norm_linear,
            {"x": normal(2, T, 32), "norm_weight": normal(32), "norm_bias": normal(32, seed=1),
             "linear_weight": normal(8, 32), "linear_bias": None, "num_groups": 2},
        ),
        "rms_norm_swish_gate_linear": (
            fused_norm_gate.rms_norm_swish_gate_linear, norm.rms_norm_swish_gate_linear,
            {"x": normal(2, T, 32), "g": normal(2, T, 32, seed=1), "norm_weight": normal(32), "norm_bias": None,
             "linear_weight": normal(8, 32), "linear_bias": normal(8)},
        ),
        "powglu": (activation.powglu, norm.powglu, (normal(2, T, 32), normal(2, T, 32, seed=1))),
        "powglu_linear": (activation.powglu_linear, norm.powglu_linear, (
            normal(2, T, 32), normal(2, T, 32, seed=1), normal(8, 32), normal(8), 2.0
        )),
    }  # fmt: skip
    # fla's retention takes any simple GLA: here its own kernel, and the same function around our reference
    for name in ("chunk_retention", "fused_chunk_retention", "fused_recurrent_retention"):
        kernel = getattr(retention, name)
        table |= forms(name, kernel, retention_of(linear.simple_gla), linear_inputs, one, three)
    keys, keys3 = (normal(n, 1, 2, 16).detach().exp().requires_grad_() for n in (2, 3))
    pair, pair3 = ({"first_state": x, "second_state": y} for x, y in ((state, keys), (state3, keys3)))
    for name in ("chunk_linear_attn", "fused_chunk_linear_attn", "fused_recurrent_linear_attn"):
        kernel = getattr(linear_attn, name)
        for normalize in (False, True):
            inputs = functools.partial(linear_inputs, positive=normalize, normalize=normalize)
            states = (pair, pair3) if normalize else (one, three)
            table |= forms(f"{name} normalize={normalize}", kernel, linear.linear_attention, inputs, *states)
    table |= forms(
        "fused_recurrent_hgrn", hgrn.fused_recurrent_hgrn, linear.hgrn, hgrn_inputs,
        {"initial_state": normal(2, 40)}, {"initial_state": normal(3, 40)},
    )  # fmt: skip
    chunk, reference = (without_gradient_of_states(f) for f in (hgrn.chunk_hgrn, linear.hgrn))
    given = {"initial_state": normal(2, 40).detach(), "output_final_state": True}
    table |= {
        "chunk_hgrn": (chunk, reference, hgrn_inputs()),
        "chunk_hgrn with states": (chunk, reference, hgrn_inputs(**given)),
    }
    slots, slots3 = (
        {"first_state": normal(n, 2, 16, 16), "second_state": normal(n, 2, 16, 32)} for n in (2, 3)
    )  # fmt: skip
    lights, lights3 = (
        {"first_state": normal(n, 2, 16, 32), "second_state": normal(n, 1, 2, 16)} for n in (2, 3)
    )  # fmt: skip
    for name in ("chunk_gsa", "fused_recurrent_gsa"):
        table |= forms(name, getattr(gsa, name), slot.gated_slot_attention, slot_inputs, slots, slots3)
    for name in ("chunk_lightnet", "fused_recurrent_lightnet"):
        table |= forms(name, getattr(lightnet, name), slot.lightnet, linear_inputs, lights, lights3)
    return table


def retention_of(simple_gla):
    """Retention's decays, 1 - 2^(-5 - head), for a simple GLA."""

    def call(q, **kwargs):
        return simple_gla(q, g_gamma=torch.log1p(-(2.0 ** (-5 - torch.arange(q.shape[2])))), **kwargs)

    return call


@pytest.mark.slow
def test_every_reference_equals_its_kernel():
    errors = run(__file__)
    assert len(errors) == 73
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


if __name__ == "__main__":
    from tests.models import interpreter

    interpreter.install()
    print(json.dumps(compare(cases())))
