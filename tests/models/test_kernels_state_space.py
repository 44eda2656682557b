"""The RWKV references and Mamba 2 against the Triton kernels of fla they stand in for, in fp32.

`pytest -m slow` runs this file again as a script, because the interpreter has to be on before fla is imported. The
kernels of Mamba are CUDA code of the packages mamba_ssm and causal_conv1d, which cannot run here:
test_reference_state_space.py compares its reference with the recurrence.
"""

import functools
import json
import os
import sys

import pytest
import torch
import torch.nn.functional as F

from tests.models.kernels import compare, run

T, HEADS, K, V = 70, 2, 16, 32  # up to 64 tokens fla's layers use other kernels
CU_SEQLENS = [0, 3, 68, 70]
ROUGH = "rwkv7 chunk in fp16"  # told that the decays are safe, the kernel inverts a matrix in fp16, whatever its inputs


def normal(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=rng).requires_grad_()


def decays(*shape, seed=3):
    return (F.logsigmoid(normal(*shape, seed=seed).detach()) / 4).requires_grad_()


def rwkv6_inputs(batch=2, **options):
    shape = (batch, T, HEADS, K)
    r, k = (normal(*shape, seed=i) for i in range(2))
    return {"r": r, "k": k, "v": normal(batch, T, HEADS, V), "w": decays(*shape), "u": normal(HEADS, K), **options}


def rwkv7_inputs(batch=2, **options):
    # w, a and b as the layer makes them: it tells the kernel that w is above -0.6065306597126334.
    shape = (batch, T, HEADS, K)
    r, k, w, removed, rate = (normal(*shape, seed=i).detach() for i in range(5))
    removed = F.normalize(removed, dim=-1)
    given = {"r": r, "w": -0.6065306597126334 * w.sigmoid(), "k": k, "v": normal(batch, T, HEADS, V).detach()}
    given |= {"a": -removed, "b": removed * rate.sigmoid()}
    return {name: x.requires_grad_() for name, x in given.items()} | {"scale": 1.0} | options


def rwkv7_decode_inputs(batch=2, **options):
    given = rwkv7_inputs(batch)
    kk = -given.pop("a").detach()
    given |= {"kk": kk, "a": given.pop("b").norm(dim=-1, keepdim=True).expand_as(kk)}
    return {name: x.detach() if torch.is_tensor(x) else x for name, x in given.items()} | options  # forward only


def shift_inputs(batch=2, **options):
    return {"x": normal(batch, T, 24), **options}


def packed(inputs, **options):
    return inputs(1, cu_seqlens=torch.tensor(CU_SEQLENS), **options)


def mixed(mix, x, delta, weights):
    return mix(x, delta, *weights.unbind())


def without_the_gradient_of_the_state(op):
    """fused_recurrent_rwkv6 hands the final state on, for decoding, and passes no gradient through it."""

    def call(**inputs):
        o, state = op(**inputs)
        return o, (None if state is None else state.detach())

    return call


def mamba2_layer(groups):
    """The output of fla's Mamba 2 by its Triton kernels as flame calls them, and by fla token by token."""
    from fla.layers.mamba2 import Mamba2

    from flame.models.reference import mamba

    torch.manual_seed(0)
    layer = Mamba2(hidden_size=32, head_dim=16, state_size=16, n_groups=groups)

    def decode(x, *_):
        last = {"conv_state": x.new_zeros(2, layer.conv_dim, 4), "recurrent_state": x.new_zeros(2, 4, 16, 16)}
        outputs = []
        for token in x.split(1, 1):
            o, last["conv_state"], last["recurrent_state"] = layer.torch_forward(token, last)
            outputs.append(o)
        return torch.cat(outputs, 1)

    return decode, lambda x: mamba.mamba2(layer, x)[0], {"x": normal(2, T, 32)}


def look_gather_up_late():
    """The interpreter replaces triton.language's functions while a kernel runs; fla keeps this one by name."""
    from triton import language

    for name, module in sys.modules.items():
        if name.startswith("fla.ops.generalized_delta_rule.dplr.") and hasattr(module, "gather"):
            module.gather = lambda *args, **kwargs: language.gather(*args, **kwargs)


def cases():
    """name -> (fla's kernel, our reference, inputs); called in the interpreter's process only."""
    from fla.modules import token_shift as fla_shift
    from fla.modules.activations.ops import sqrelu
    from fla.modules.norm import layernorm_gated
    from fla.ops import rwkv6, rwkv7
    from fla.ops.rwkv7 import fused_addcmul, fused_k_update, gate_output_correction

    from flame.models.reference import mamba, rwkv

    state = {"output_final_state": True}
    two, three = normal(2, HEADS, K, V), normal(3, HEADS, K, V)
    recurrent6 = [without_the_gradient_of_the_state(f) for f in (rwkv6.fused_recurrent_rwkv6, rwkv.rwkv6)]
    table = {}
    for name, kernel, ours, inputs in (
        ("rwkv6 chunk", rwkv6.chunk_rwkv6, rwkv.rwkv6, rwkv6_inputs),
        ("rwkv6 recurrent", *recurrent6, rwkv6_inputs),
        ("rwkv7 chunk", rwkv7.chunk_rwkv7, rwkv.rwkv7, rwkv7_inputs),
        ("rwkv7 recurrent", rwkv7.fused_mul_recurrent_rwkv7, rwkv.rwkv7_decode, rwkv7_decode_inputs),
    ):
        first, firsts = (x.detach() if name == "rwkv7 recurrent" else x for x in (two, three))
        table |= {
            name: (kernel, ours, inputs()),
            f"{name} with states": (kernel, ours, inputs(initial_state=first, **state)),
            f"{name} packed": (kernel, ours, packed(inputs)),
            f"{name} packed with states": (kernel, ours, packed(inputs, initial_state=firsts, **state)),
        }
    layer = {"safe_gate": True, "lower_bound": -0.6065306597126334, "chunk_size": 64}  # what the layer passes
    table[ROUGH] = (rwkv7.chunk_rwkv7, rwkv.rwkv7, rwkv7_inputs(**layer))
    shift = (fla_shift.token_shift, rwkv.token_shift)
    x, y, weight = normal(2, T, 24), normal(2, T, 24, seed=1), normal(24)
    heads = [normal(2, T, 3, 8, seed=i) for i in range(3)]
    norm = (layernorm_gated.rmsnorm_fn, mamba.rms_norm_gated)
    mix = [functools.partial(mixed, f) for f in (fused_addcmul.fused_addcmul_rwkv7, rwkv.mix_previous)]
    correct = {"o": x, "r": heads[0], "k": heads[1], "r_k": normal(3, 8), "v": heads[2], "g": y}
    return table | {
        "shift": (*shift, shift_inputs()),
        "shift with caches": (*shift, shift_inputs(cache=normal(2, 24), output_cache=True)),
        "shift packed": (*shift, packed(shift_inputs)),
        "shift packed with caches": (*shift, packed(shift_inputs, cache=normal(3, 24), output_cache=True)),
        "mix": (*mix, (x, y, normal(6, 24))),
        "mix of five": (*mix, (x, y, normal(5, 24))),
        "key": (fused_k_update.fused_k_rwkv7, rwkv.update_key, (x, y, weight)),
        "output": (gate_output_correction.gate_output_correction, rwkv.correct_output, correct),
        "squared relu": (sqrelu, rwkv.squared_relu, (x,)),
        "mamba2": mamba2_layer(1),
        "mamba2 with four groups": mamba2_layer(4),
        "norm": (*norm, {"x": x, "weight": weight, "bias": None}),
        "norm, then gate": (*norm, {"x": x, "weight": weight, "bias": None, "z": y}),
        "gate, then norm": (*norm, {"x": x, "weight": weight, "bias": None, "z": y, "norm_before_gate": False}),
        "gate, then norm of groups": (
            *norm, {"x": x, "weight": weight, "bias": None, "z": y, "norm_before_gate": False, "group_size": 8}
        ),
    }  # fmt: skip


@pytest.mark.slow
def test_every_reference_equals_its_kernel():
    errors = run(__file__)
    assert len(errors) == 32
    assert errors.pop(ROUGH) < 1e-3
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


if __name__ == "__main__":
    from tests.models import interpreter

    interpreter.install()
    os.environ["FLA_USE_COMPILE"] = "0"  # fla compiles a few plain PyTorch lines beside its kernels:
    torch.compiler.set_stance("force_eager")  # no compiler is needed to test them
    table = cases()
    look_gather_up_late()
    print(json.dumps(compare(table)))
