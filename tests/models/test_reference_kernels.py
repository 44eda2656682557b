"""Every reference against the Triton kernel of fla that it stands in for, forward and gradients, in fp32.

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


def norm_inputs(**options):
    return {"x": normal(2, T, 32), "weight": normal(32), "bias": normal(32, seed=1), **options}


def gated_inputs(**options):
    return {"x": normal(T, 2, 16), "g": normal(T, 2, 16, seed=1), "weight": normal(16), "bias": None, **options}


def conv_inputs(batch=2, **options):
    return {"x": normal(batch, T, 16), "weight": normal(16, 4), "bias": normal(16), **options}


def gla_inputs(batch=2, gate="g", **options):
    shape = (batch, T, 2, 16)
    return {
        "q": normal(*shape),
        "k": normal(*shape, seed=1),
        "v": normal(batch, T, 2, 32),
        gate: decays(*shape),
        **options,
    }


def rotary_inputs(batch=2, **options):
    angle = torch.rand(T + 5, 4, generator=torch.Generator().manual_seed(0)) * 6
    return {"x": normal(batch, T, 2, 16), "cos": angle.cos(), "sin": angle.sin(), **options}


def used_part_of_the_state(conv):
    """The oldest of the W tokens in the final state is never read again, and the kernel passes no gradient to it."""

    def call(*args, **kwargs):
        y, state = conv(*args, **kwargs)
        return y, state[..., 1:]

    return call


def packed(inputs, **options):
    return inputs(1, cu_seqlens=torch.tensor(CU_SEQLENS), **options)


def cases():
    """name -> (fla's kernel, our reference, inputs); called in the interpreter's process only."""
    from fla.modules.activations import ops as activation
    from fla.modules.causal_conv1d import ops as conv
    from fla.modules.norm import fused_norm_gate, layernorm
    from fla.modules.norm.l2norm import l2norm
    from fla.modules.rotary import ops as rotary
    from fla.ops import gla

    from flame.models.reference import attention, convolution, linear_attention, norm

    rms = functools.partial(norm.norm, is_rms_norm=True)
    x, y, residual = normal(2, T, 32), normal(2, T, 32, seed=1), normal(2, T, 32, seed=2)
    added = normal(2, T, 16)
    convs = [used_part_of_the_state(f) for f in (conv.causal_conv1d, convolution.causal_conv1d)]
    state = {"output_final_state": True, "state_v_first": True}
    given, given3 = normal(2, 2, 32, 16), normal(3, 2, 32, 16)
    linear, gla_forms = linear_attention.gated_linear_attention, {"g": gla.chunk_gla, "gk": gla.fused_recurrent_gla}
    table = {
        "rms_norm": (layernorm.rms_norm, rms, norm_inputs(residual=residual, prenorm=True)),
        "layer_norm": (layernorm.layer_norm, norm.norm, norm_inputs(prenorm=True, residual_in_fp32=True)),
        "group_norm": (layernorm.group_norm, norm.norm, norm_inputs(residual=residual, num_groups=2)),
        "rms_norm_gated swish": (fused_norm_gate.rms_norm_gated, norm.rms_norm_gated, gated_inputs()),
        "rms_norm_gated sigmoid": (
            fused_norm_gate.rms_norm_gated, norm.rms_norm_gated, gated_inputs(activation="sigmoid")
        ),
        "l2norm": (l2norm, norm.l2norm, {"x": x}),
        "swish": (activation.swish, F.silu, (x,)),
        "sigmoid": (activation.sigmoid, torch.sigmoid, (x,)),
        "swiglu": (activation.swiglu, norm.swiglu, (x, y)),
        "swiglu_linear": (activation.swiglu_linear, norm.swiglu_linear, (x, y, normal(8, 32), normal(8))),
        "rotary": (rotary.rotary_embedding, attention.rotary_embedding, rotary_inputs(seqlen_offsets=3)),
        "rotary interleaved": (rotary.rotary_embedding, attention.rotary_embedding, rotary_inputs(interleaved=True)),
        "rotary packed": (rotary.rotary_embedding, attention.rotary_embedding, packed(rotary_inputs)),
        "conv": (conv.causal_conv1d, convolution.causal_conv1d, conv_inputs(residual=added, activation="silu")),
        "conv with states": (*convs, conv_inputs(initial_state=normal(2, 16, 4), output_final_state=True)),
        "conv packed": (conv.causal_conv1d, convolution.causal_conv1d, packed(conv_inputs)),
        "conv packed with states": (
            *convs, packed(conv_inputs, initial_state=normal(3, 16, 4), output_final_state=True)
        ),
        "conv one step": (conv.causal_conv1d_update, convolution.causal_conv1d_update, {
            "x": normal(5, 1, 16).detach(), "cache": normal(5, 16, 4).detach(), "weight": normal(16, 4).detach(),
            "activation": "silu",
        }),
    }  # fmt: skip
    for gate, kernel in gla_forms.items():
        table |= {
            f"gla {gate}": (kernel, linear, gla_inputs(gate=gate, scale=0.3)),
            f"gla {gate} with states": (kernel, linear, gla_inputs(gate=gate, initial_state=given, **state)),
            f"gla {gate} packed": (kernel, linear, packed(gla_inputs, gate=gate)),
            f"gla {gate} packed with states": (
                kernel, linear, packed(gla_inputs, gate=gate, initial_state=given3, **state)
            ),
        }  # fmt: skip
    return table


@pytest.mark.slow
def test_every_reference_equals_its_kernel():
    errors = run(__file__)
    assert len(errors) == 26
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


if __name__ == "__main__":
    from tests.models import interpreter

    interpreter.install()
    print(json.dumps(compare(cases())))
