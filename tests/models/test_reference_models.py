"""Whole models of fla on the CPU references: training, packing, decoding, generation, compile."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from flame.errors import UserError
from flame.models import reference
from flame.models.reference import _SUPPORTED
from tests.models.kernels import gradients, worst

reference.enable()
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "vocab_size": 64, "fuse_cross_entropy": False}
HEADS = {"head_dim": 16, "expand_v": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16}
ATTENTION = {"layers": [1], "num_heads": 2, "window_size": 24}
TYPES = {  # model type: fields
    "delta_net": {},
    "gated_deltanet": HEADS,
    "gated_deltaproduct": {**HEADS, "num_householder": 2},
    "gla": {},
    "gsa": {"num_slots": 8},
    "hgrn": {"num_heads": None},
    "hgrn2": {"expand_ratio": 16},
    "kda": HEADS,
    "lightnet": {"expand_ratio": 16},
    "linear_attn": {},
    "mamba": {"num_heads": None, "state_size": 8},
    "mamba2": {"num_heads": None, "head_dim": 16, "state_size": 16, "n_groups": 2},
    "mla": {**LATENT, "v_head_dim": 16},
    "retnet": {},
    "rwkv6": {"proj_low_rank_dim": 8, "gate_low_rank_dim": 8},
    "rwkv7": {"num_heads": None, "head_dim": 16},
    "samba": {"num_heads": None, "attn": {**ATTENTION, "window_size": 16}},
    "transformer": {},
}
VARIANTS = {  # name: model type, more fields
    **{name: (name, {}) for name in TYPES},
    "gla with short convolutions": ("gla", {"use_short_conv": True}),
    "gla with grouped keys": ("gla", {"num_kv_heads": 1, "feature_map": "relu"}),
    "gla without fusion": ("gla", {"fuse_norm": False, "fuse_swiglu": False}),
    "gla with attention residuals": ("gla", {"attnres_block_size": 2}),
    "hybrid gla": ("gla", {"attn": ATTENTION}),
    "transformer with all options": ("transformer", {"num_kv_heads": 1, "qk_norm": True, "window_size": 24}),
    "delta_net with all options": (
        "delta_net",
        {"use_gate": True, "allow_neg_eigval": True, "qk_norm": "sum", "qk_activation": "elu", "conv_bias": True},
    ),
    "gated_deltanet with all options": (
        "gated_deltanet",
        {"num_v_heads": 4, "allow_neg_eigval": True, "output_gate_activation": "sigmoid"},
    ),
    "gated_deltaproduct with all options": (
        "gated_deltaproduct",
        {"num_householder": 3, "use_forget_gate": True, "allow_neg_eigval": True, "num_v_heads": 4},
    ),
    "kda with all options": (
        "kda",
        {"num_v_heads": 4, "allow_neg_eigval": True, "safe_gate": True, "lower_bound": -5.0},
    ),
    "retnet with short convolutions": ("retnet", {"use_short_conv": True, "num_kv_heads": 1, "expand_k": 0.5}),
    "retnet without fusion": ("retnet", {"fuse_norm": False, "attn_mode": "fused_chunk"}),
    "normalized linear_attn": (
        "linear_attn",
        {"norm_feature_map": True, "feature_map": "elu", "attn_mode": "chunk", "num_kv_heads": 1},
    ),
    "hybrid hgrn2": ("hgrn2", {"use_short_conv": True, "attn": ATTENTION}),
    "gsa with short convolutions": ("gsa", {"use_short_conv": True, "num_kv_heads": 1, "hidden_act": "powlu"}),
}
UNUSED = {  # parameters that the output of two blocks does not depend on
    "gla with attention residuals": "layers.0.attn_res",  # of which there is one to choose from
    "hybrid hgrn2": "lower_bounds",  # that of the first block is 0
}
UNPACKED = ("linear_attn", "mamba", "mamba2", "samba")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def build(name, **sizes):
    model_type, fields = VARIANTS[name]
    torch.manual_seed(0)
    given = {
        key: value for key, value in {**SIZES, **TYPES[model_type], **fields, **sizes}.items() if value is not None
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **given))
    assert type(model).__module__.startswith("fla.models.")  # transformers has a mamba and a mamba2 too
    return model


def varied(name):
    """A model whose weights are large enough, or not zero, that a state of the wrong document shows."""
    model = build(name)
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(std=0.1)
            elif weight.ndim > 1:
                weight.mul_(2 if model.config.model_type in ("mamba", "mamba2", "samba", "rwkv6", "rwkv7") else 3)
    return model


@pytest.mark.parametrize("name", TYPES)
def test_a_model_learns_to_copy(name):
    model = build(name, vocab_size=8, hidden_size=64)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(30):
        x = torch.randint(0, 8, (32, 2)).repeat(1, 12)
        labels = torch.cat([torch.full_like(x[:, :2], -100), x[:, 2:]], 1)  # the first two cannot be known
        loss = model(x, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert loss < math.log(8) / 2  # without looking back it stays at log 8


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient(name):
    model = varied(name)
    x = torch.randint(0, 64, (2, 80))
    model(x, labels=x, use_cache=False).loss.backward()
    gradient = {key: torch.zeros(1) if p.grad is None else p.grad for key, p in model.named_parameters()}
    missing = [key for key, g in gradient.items() if not (g.isfinite().all() and g.any())]
    assert [key for key in missing if UNUSED.get(name, "-") not in key] == []


@pytest.mark.parametrize("name", [name for name, (model_type, _) in VARIANTS.items() if model_type not in UNPACKED])
def test_packed_documents_equal_separate_documents(name):
    model, bounds = varied(name), [0, 3, 70, 71, 150]
    x = torch.randint(0, 64, (1, bounds[-1]))
    with torch.no_grad():
        packed = model(x, use_cache=False, cu_seqlens=torch.tensor(bounds, dtype=torch.int32)).logits
        separate = [model(x[:, a:b], use_cache=False).logits for a, b in itertools.pairwise(bounds)]
        assert worst([packed], [torch.cat(separate, 1)]) < 1e-5
        assert worst([model(x, use_cache=False).logits], [packed]) > 1e-2


def test_linear_attention_packs_in_its_layer_but_not_in_its_model():
    model, bounds, x = varied("linear_attn"), [0, 3, 70, 71, 150], torch.randn(1, 150, 32)
    layer, cu_seqlens = model.model.layers[0].attn, torch.tensor(bounds)
    with torch.no_grad():
        separate = torch.cat([layer(x[:, a:b])[0] for a, b in itertools.pairwise(bounds)], 1)
        assert worst([layer(x, cu_seqlens=cu_seqlens)[0]], [separate]) < 1e-5
        assert worst([layer(x)[0]], [separate]) > 1e-2
    with pytest.raises(TypeError, match="cu_seqlens"):  # fla's model hands its blocks no boundaries
        model.model(torch.zeros(1, 150, dtype=torch.long), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("name, layer", [("mamba", "Mamba.forward"), ("mamba2", "mamba2"), ("samba", "Mamba.forward")])
def test_packing_is_rejected_where_the_layer_of_fla_would_leak(name, layer):
    with pytest.raises(NotImplementedError, match=f"{layer}: cu_seqlens is not supported"):
        build(name)(torch.zeros(1, 9, dtype=torch.long), cu_seqlens=torch.tensor([0, 4, 9]))


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_with_the_cache_equals_the_full_forward(name):
    model = varied(name).eval()
    x = torch.randint(0, 64, (2, 80))
    with torch.no_grad():
        full = model(x, use_cache=False).logits
        out = model(x[:, :70], use_cache=True)
        logits = [out.logits]
        for t in range(70, 80):
            out = model(x[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
    assert worst([torch.cat(logits, 1)], [full]) < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_generation_of_a_left_padded_batch_equals_generation_of_each_prompt(name):
    model = varied(name).eval()
    prompts = [torch.randint(3, 64, (n,)) for n in (5, 9)]
    padded = torch.stack([F.pad(p, (9 - len(p), 0)) for p in prompts])
    mask = torch.stack([F.pad(torch.ones_like(p), (9 - len(p), 0)) for p in prompts])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(padded, attention_mask=mask, **options)[:, 9:]
    alone = [model.generate(p[None], **options)[0, len(p) :] for p in prompts]
    assert torch.equal(together, torch.stack(alone))


# samba's mixers are those of mamba and of transformer
@pytest.mark.parametrize("name", ["gla with short convolutions", "transformer", "mamba", "mamba2", "rwkv6", "rwkv7"])
def test_a_block_compiles_without_a_graph_break(name):
    model, x = varied(name), torch.randn(1, 80, 32, requires_grad=True)
    if name == "transformer":
        model.eval()  # in training fla's rotary module asks `tensor.is_inference()`: a graph break on any device
    model(torch.zeros(1, 80, dtype=torch.long), use_cache=False)  # fills the rotary tables
    block = model.get_decoder().layers[0]
    options = {"cu_seqlens": torch.tensor([0, 30, 80])} if "gla" in name else {}
    expected = block(x, **options)[0]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(x, **options)[0]
    assert worst([compiled], [expected]) < 1e-6
    assert worst(gradients([compiled], [x]), gradients([expected], [x])) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kda", "gated_deltanet", "gated_deltaproduct"])
def test_compiled_blocks_have_the_gradients_of_eager_ones(name):
    model, tokens, found = build(name, num_hidden_layers=1, num_heads=4), torch.randint(0, 64, (2, 70)), []
    for compiled in (False, True):
        if compiled:
            model.model.layers[0] = torch.compile(model.model.layers[0], backend="aot_eager")
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", TYPES)
def test_a_model_trains_under_bf16_autocast(name):
    model = build(name)
    x = torch.randint(0, 64, (2, 80))
    expected = model(x, labels=x, use_cache=False).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, labels=x, use_cache=False).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_these_are_the_model_types_that_a_cpu_supports_and_others_are_rejected():
    assert set(TYPES) == _SUPPORTED
    for supported in TYPES:
        reference.check_supported(supported)
    with pytest.raises(UserError) as error:
        reference.check_supported("nsa")
    assert error.value.setting == "--model.config" and "nsa" in error.value.found
    assert {"gla,", "retnet,"} <= set(error.value.allowed.split())
