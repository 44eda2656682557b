"""The FLOPs that MFU is computed from, against torch's own count of what is done.

FlopCounterMode counts matrix products and nothing elementwise. So a model's products with its weights are counted on a
real forward; attention on transformers' eager path; and each recurrence, which kernels compute in chunks and the CPU
references partly elementwise, on its definition written out here for one token as matrix products.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import JetMoeConfig, JetMoeForCausalLM

from flame.models.causal_lm import CausalLM, ModelArgs
from flame.models.flops import active_params
from flame.training.metrics import known_peak_flops
from tests.models.small import OTHERS, WITHOUT_ROW, distinct, small

ATEN = torch.ops.aten
SEQ = 64


def count(run):
    """{operator: FLOPs} of what `run` does."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_flop_counts()["Global"]


def build(name, **changes):
    family, config = small(name, **changes)
    config._experts_implementation = "eager"  # torch counts no grouped product
    args = ModelArgs().bind(family, config)
    model = CausalLM(args)
    model.init_weights()
    return args, model.eval()


@pytest.mark.parametrize("name", [*distinct(), *OTHERS, *WITHOUT_ROW])
@torch.no_grad()
def test_the_products_with_weights_are_those_of_a_forward(name):
    # Wide enough that what is elementwise, as Mamba's decays are, is less than the tolerance.
    wide = {"mamba_1B": {"width": 256}, "falcon_mamba": {"hidden_size": 256}}
    args, model = build(name, **wide.get(name, {}))
    tokens = torch.randint(0, 320, (1, SEQ))
    done = count(lambda: model(tokens))
    products = done.get(ATEN.mm, 0) + done.get(ATEN.addmm, 0)  # attention and states are batched: bmm
    if name == "rwkv6":  # and so is one of its matrices
        products += 2 * SEQ * sum(layer.attn.x_proj[2].weight.numel() for layer in model.layers)
    flops = args.get_nparams_and_flops(model, SEQ)[1] - 3 * args.hf_family.mixer_flops(args.hf_config, SEQ)
    assert flops == pytest.approx(3 * products / SEQ, rel=0.05)  # a backward is twice a forward


@pytest.mark.parametrize("name", ["llama_7B", "llama2_70B", "pythia_160M", "falcon_7B", "qwen3_0.6B", "mixtral_8x7B"])
@torch.no_grad()
def test_attention_costs_the_causal_half_of_the_eager_square(name):
    family, config = small(name)
    config._attn_implementation = "eager"
    config.sliding_window = None
    model = CausalLM(ModelArgs().bind(family, config))
    model.init_weights()
    tokens = torch.randint(0, 320, (1, 128))
    assert 2 * 128 * family.mixer_flops(config, 128) == pytest.approx(count(lambda: model(tokens))[ATEN.bmm], rel=0.05)


@pytest.mark.parametrize("name", ["mistral_7B", "samba_1B", "gated_deltanet_hybrid_340M"])
def test_a_window_costs_the_pairs_it_lets_through(name):
    (family, config), length = small(name), 512
    wide = family.mixer_flops(config, 10**9) / family.mixer_flops(config, 2 * 10**9)
    assert wide == pytest.approx(1, rel=1e-3)  # no longer grows with the row
    window = config.sliding_window if name == "mistral_7B" else config.attn["window_size"]
    pairs = sum(min(i + 1, window) for i in range(length))
    heads, layers = (64, 2) if name == "mistral_7B" else (64, 1)
    attention = layers * 2 * 2 * heads * pairs / length
    if name == "mistral_7B":
        assert family.mixer_flops(config, length) == pytest.approx(attention, rel=0.05)
    else:  # what is left is the recurrent layer's, which does not depend on the row
        rest = family.mixer_flops(config, length) - attention
        assert rest == pytest.approx(family.mixer_flops(config, 1) - 2 * 64, rel=0.05)


# One token of each recurrence -----------------------------------------------------------------------------------------


def read(state, key):
    return key.unsqueeze(-2) @ state


def write(state, key, value):
    return state + key.unsqueeze(-1) @ value.reshape(*key.shape[:-1], 1, -1)


def linear(heads, k, v):
    state, key, value = torch.zeros(heads, k, v), torch.zeros(heads, k), torch.zeros(heads, v)
    read(write(state, key, value), key)


def delta(heads, k, v, writes=1):
    state, key, value = torch.zeros(heads, k, v), torch.zeros(heads, k), torch.zeros(heads, v)
    for _ in range(writes):
        state = write(state, key, value - read(state, key).squeeze(-2))
    read(state, key)


def slots(heads, k, m, v):
    keys, values = torch.zeros(heads, k, m), torch.zeros(heads, m, v)
    key, value, slot = torch.zeros(heads, k), torch.zeros(heads, v), torch.zeros(heads, m)
    read(write(values, slot, value), read(write(keys, key, slot), key).squeeze(-2))


def rwkv7(heads, k, v):
    state, key, value = torch.zeros(heads, k, v), torch.zeros(heads, k), torch.zeros(heads, v)
    state = write(write(state, key, read(state, key)), key, value)
    read(state, key)


RECURRENCES = {  # name: one token of one layer, of the sizes its mixer has
    "gla_340M": lambda m: linear(m.num_heads, m.head_k_dim, m.head_v_dim),
    "retnet_340M": lambda m: linear(m.num_heads, m.head_k_dim, m.head_v_dim),
    "linear_attn": lambda m: linear(m.num_heads, m.head_k_dim, m.head_v_dim),
    "rwkv6": lambda m: linear(m.num_heads, m.head_k_dim, m.head_v_dim),
    "hgrn2_340M": lambda m: linear(m.num_heads, m.head_f_dim, m.head_i_dim),
    "delta_net_340M": lambda m: delta(m.num_heads, m.head_k_dim, m.head_v_dim),
    "gated_deltanet_340M": lambda m: delta(m.num_v_heads, m.head_k_dim, m.head_v_dim),
    "kda_340M": lambda m: delta(m.num_v_heads, m.head_k_dim, m.head_v_dim),
    "gated_deltaproduct_340M": lambda m: delta(m.num_v_heads, m.head_k_dim, m.head_v_dim, m.num_householder),
    "gsa_340M": lambda m: slots(m.num_heads, m.head_k_dim, m.num_slots, m.head_v_dim),
    "rwkv7_340M": lambda m: rwkv7(m.num_heads, m.head_dim, m.head_v_dim),
    "mamba_340M": lambda m: linear(1, m.ssm_state_size, m.intermediate_size),
    "mamba2_340M": lambda m: linear(m.num_heads, m.ssm_state_size, m.head_dim),
}


@pytest.mark.parametrize("name", RECURRENCES)
def test_a_recurrence_costs_its_definition(name):
    args, model = build(name)
    block = model.layers[0]
    mixer = block.attn if hasattr(block, "attn") else block.mixer
    done = count(lambda: RECURRENCES[name](mixer))
    expected = sum(done.values()) * args.hf_config.num_hidden_layers
    assert args.hf_family.mixer_flops(args.hf_config, SEQ) == pytest.approx(expected, rel=0.05)


def test_latent_attention_costs_its_unequal_heads():
    (family, config), length = small("mla"), 128
    q, k, v = (torch.zeros(4, length, width) for width in (32, 32, 16))
    done = count(lambda: (q @ k.mT) @ v)[ATEN.bmm]
    assert 2 * length * family.mixer_flops(config, length) == pytest.approx(config.num_hidden_layers * done, rel=0.05)


def test_experts_that_a_token_is_not_routed_to_cost_nothing():
    few, many = (build("mixtral_8x7B", num_local_experts=n) for n in (4, 16))
    (small_count, less), (large_count, more) = (args.get_nparams_and_flops(model, SEQ) for args, model in (few, many))
    assert large_count > 2 * small_count
    assert more == pytest.approx(less, rel=0.05)  # the router is wider


def test_only_top_k_experts_count_wherever_a_model_has_them():
    sizes, active = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "kv_channels": 16}, []
    for experts in (4, 16):  # of the MLP and of attention, neither under the name `experts` alone
        config = JetMoeConfig(
            **sizes, vocab_size=320, num_hidden_layers=2, num_local_experts=experts, num_experts_per_tok=2
        )
        with torch.device("meta"):
            model = JetMoeForCausalLM(config)
        active.append(active_params(model, config, None))
        unknown = SimpleNamespace(num_experts_per_tok=None)  # as DeepSeek-V2's is, unless it is given
        assert active_params(model, unknown, model.get_input_embeddings()) == sum(p.numel() for p in model.parameters())
    assert active[1] - active[0] == 2 * 2 * 12 * 64  # two layers' two routers are wider


def test_a_convolution_is_not_an_expert():
    model = nn.Sequential(nn.Conv1d(64, 64, 4, groups=64, bias=False))
    assert active_params(model, SimpleNamespace(num_experts_per_tok=2), None) == 64 * 4


def test_the_peak_of_a_device_is_known_or_none():
    assert known_peak_flops("NVIDIA H200") > 5e14
    assert known_peak_flops("CPU") is None
    assert known_peak_flops("Some GPU of tomorrow") is None
