"""The delta-rule references against the Triton kernels of fla that they stand in for, forward and gradients, in fp32.

`pytest -m slow` runs this file again as a script, because the interpreter has to be on before fla is imported.
"""

import json

import pytest
import torch
import torch.nn.functional as F

from tests.models.kernels import compare, run

T, H, K, V = 70, 2, 16, 32  # more than a chunk of the kernels
UNIT = {"use_qk_l2norm_in_kernel": True}
LAYER = {**UNIT, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "state_v_first": True}


def inputs(*, steps=1, gate=None, states=False, packed=False, learn=True, **options):
    """Keywords of a call, `steps` of k, v and beta for each q. gate is "head", "channel" or None: what g decays."""
    rng = torch.Generator().manual_seed(0)
    batch = 1 if packed else 2
    values = 2 * H if options.get("use_gate_in_kernel") else H

    def normal(*shape):
        return torch.randn(shape, generator=rng)

    q, k = (F.normalize(normal(batch, n, H, K), dim=-1) for n in (T, T * steps))
    tensors = {"q": q, "k": k, "v": normal(batch, T * steps, values, V), "beta": normal(batch, T * steps, values)}
    channels = (K,) if gate == "channel" else ()
    tensors |= {"g": normal(batch, T, values, *channels)} if gate else {}
    if options.get("use_gate_in_kernel"):  # the kernel makes decays of g and takes the sigmoid of beta
        # Mild decays, as a layer starts with: the kernels subtract sums of log decays, and with strong ones their own
        # rounding is all that is measured (test_reference_delta.py has the strong ones).
        tensors |= {"A_log": normal(values) / 2, "dt_bias": normal(values * (K if channels else 1)) - 3}
    else:
        tensors["beta"] = tensors["beta"].sigmoid()
        if gate:
            tensors["g"] = F.logsigmoid(tensors["g"]) / 4
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 3, 68, T])
    if states:
        state = normal(3 if packed else 2, values, K, V)
        tensors["initial_state"] = state.mT.contiguous() if options.get("state_v_first") else state
        options["output_final_state"] = True
    if steps > 1:
        options["num_householder"] = steps
    return {name: x.requires_grad_(learn) for name, x in tensors.items()} | options


# The public chunk_delta_rule and chunk_gated_delta_product only check their arguments and set the scale before these
# two autograd functions; one check is `assert q.dtype != torch.float32`, and interpreted bf16 is wrong.


def chunk_delta_rule(
    q, k, v, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, cu_seqlens=None
):
    from fla.ops.delta_rule.chunk import ChunkDeltaRuleFunction

    options = (initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)
    return ChunkDeltaRuleFunction.apply(q, k, v, beta, K**-0.5, *options)


def chunk_gated_delta_product(
    q, k, v, beta, num_householder, g=None, initial_state=None, output_final_state=False,
    use_qk_l2norm_in_kernel=False, cu_seqlens=None,
):  # fmt: skip
    from fla.ops.gated_delta_product.chunk import ChunkGatedDeltaProductFunction

    options = (num_householder, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)
    return ChunkGatedDeltaProductFunction.apply(q, k, v, g, beta, K**-0.5, *options)


def cases():
    """name -> (fla's kernel, our reference, inputs); called in the interpreter's process only."""
    from fla.ops import delta_rule as delta
    from fla.ops import gated_delta_rule as gated
    from fla.ops import kda
    from fla.ops.kda import chunk_intra
    from triton import language

    from flame.models.reference import delta_rule as ours

    # The kernels of safe_gate: their gather was bound before the interpreter replaces it for the time of a run, and the
    # interpreter knows no dot in three bf16 parts. It takes every dot in fp32.
    chunk_intra.gather = lambda *args, **options: language.gather(*args, **options)
    chunk_intra.SAFE_GATE_DOT_PRECISION = language.constexpr("ieee")
    families = {  # the last three have no backward kernel
        "delta_rule": (chunk_delta_rule, ours.delta_rule, {}),
        "recurrent delta_rule": (delta.fused_recurrent_delta_rule, ours.delta_rule, UNIT),
        "gated_delta_rule": (gated.chunk_gated_delta_rule, ours.gated_delta_rule, {"gate": "head", **LAYER}),
        "gated_delta_product": (
            chunk_gated_delta_product, ours.gated_delta_product, {"gate": "head", "steps": 2, **UNIT}
        ),
        "kda": (kda.chunk_kda, ours.kimi_delta_rule, {"gate": "channel", **LAYER}),
        "recurrent gated_delta_rule": (
            gated.fused_recurrent_gated_delta_rule, ours.gated_delta_rule, {"gate": "head", "learn": False, **LAYER}
        ),
        "recurrent kda": (
            kda.fused_recurrent_kda, ours.kimi_delta_rule, {"gate": "channel", "learn": False, **LAYER}
        ),
    }  # fmt: skip
    forms = {"": {}, " packed": {"packed": True}, " packed with states": {"packed": True, "states": True}}
    table = {
        family + form: (kernel, reference, inputs(**options, **extra))
        for family, (kernel, reference, options) in families.items()
        for form, extra in forms.items()
    }
    negative, bounded = {"allow_neg_eigval": True}, {"safe_gate": True, "lower_bound": -1.0}
    more = {
        "delta_rule of unit keys with states": ("delta_rule", {**UNIT, "states": True}),
        "gated_delta_rule of negative eigenvalues": ("gated_delta_rule", negative),
        "gated_delta_product without a gate": ("gated_delta_product", {"gate": None, "g": None}),
        "kda of negative eigenvalues, bounded": ("kda", {**negative, **bounded}),
        "recurrent kda, bounded": ("recurrent kda", {**negative, "lower_bound": -1.0}),
    }
    for name, (family, extra) in more.items():
        kernel, reference, options = families[family]
        table[name] = (kernel, reference, inputs(**options | extra))
    return table


@pytest.mark.slow
def test_every_delta_rule_reference_equals_its_kernel():
    errors = run(__file__)
    assert len(errors) == 26
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


if __name__ == "__main__":
    from tests.models import interpreter

    interpreter.install()
    print(json.dumps(compare(cases())))
