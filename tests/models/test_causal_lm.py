import itertools
import json

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM, masking_utils, modeling_flash_attention_utils

from flame.errors import UserError
from flame.models.causal_lm import CausalLM, ModelArgs, _document_mask
from flame.models.hf import known_packing, load_hf_config
from flame.models.init import Unit, init_weights
from flame.models.loss import linear_cross_entropy
from flame.models.reference import attention
from tests.models.small import OTHERS, distinct, fields_of, small
from tests.tiny import CONFIGS, write_config

FAMILIES = sorted(CONFIGS)


class FakeTokenizer:
    bos_id = None
    eos_id = 256
    added = 0

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size


def build(path, seed=0):
    family, config = load_hf_config(str(path))
    args = ModelArgs(seed=seed).bind(family, config)
    with torch.device("meta"):
        model = CausalLM(args)
    model.to_empty(device="cpu")
    model.init_weights()
    return model


def transformers_model(model):
    theirs = AutoModelForCausalLM.from_config(model.hf.config).eval()
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all(name == "lm_head.weight" and model.tied for name in missing)
    theirs.tie_weights()
    return theirs


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers_own_model_with_the_same_weights(name, tmp_path):
    model = build(write_config(tmp_path, name)).eval()
    tokens = torch.randint(0, 320, (2, 96))
    with torch.no_grad():
        assert torch.equal(model(tokens), transformers_model(model)(tokens, use_cache=False).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_equal_plain_cross_entropy_on_transformers_own_model(name, tied, tmp_path):
    model = build(write_config(tmp_path, name, tie_word_embeddings=tied))
    theirs = transformers_model(model).train()
    tokens, labels = torch.randint(0, 320, (2, 2, 96)).unbind()
    labels = labels.masked_fill(torch.rand(2, 96) < 1 / 3, -100)

    loss = model(tokens, labels=labels)
    loss.backward()
    logits = theirs(tokens, use_cache=False).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    gradients = dict(theirs.named_parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key].grad, rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_initial_weights_are_distributed_as_in_an_eager_transformers_build(name, tmp_path):
    path = write_config(tmp_path, name, hidden_size=128, vocab_size=512)
    model = build(path)
    eager = dict(AutoModelForCausalLM.from_config(model.hf.config).named_parameters())
    for key, parameter in model.named_parameters():
        assert parameter.shape == eager[key].shape
        torch.testing.assert_close(parameter.std(), eager[key].std(), rtol=0.15, atol=1e-6, msg=key)
        torch.testing.assert_close(parameter.mean(), eager[key].mean(), rtol=0, atol=5e-3, msg=key)
    for key, buffer in model.hf.base_model.named_buffers():
        torch.testing.assert_close(buffer, dict(model.backbone.named_buffers())[key])


def test_initial_weights_depend_on_the_seed_and_differ_between_blocks(tmp_path):
    path = write_config(tmp_path, "llama")
    one, same, other = build(path, seed=1), build(path, seed=1), build(path, seed=2)
    name = "self_attn.q_proj.weight"
    weights = [m.get_parameter(f"model.layers.0.{name}") for m in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], one.get_parameter(f"model.layers.1.{name}"))


def test_a_parameter_that_nothing_initialises_is_named():
    model = torch.nn.ModuleDict({"covered": torch.nn.Linear(2, 2), "forgotten": torch.nn.Linear(2, 2)})
    units = [Unit("covered", model["covered"], lambda: torch.nn.Linear(2, 2))]
    with pytest.raises(RuntimeError, match=r"forgotten\.weight, forgotten\.bias"):
        init_weights(model, units, lambda module: None, seed=0)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "transformer", "retnet"])
def test_buffers_move_to_their_device_where_parameters_are_offloaded(name, tmp_path):
    path = tmp_path / "retnet.json"
    path.write_text(json.dumps(fields_of("retnet_340M")))
    model = build(path if name == "retnet" else write_config(tmp_path, name))
    model.init_weights(buffer_device=torch.device("meta"))
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_norm_that_the_familys_own_init_forgets_is_named(tmp_path, monkeypatch):
    model = build(write_config(tmp_path, "llama"))
    own = model.hf._init_weights
    monkeypatch.setitem(model.hf.__dict__, "_init_weights", lambda m: None if "Norm" in type(m).__name__ else own(m))
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        model.init_weights()


def test_a_tied_model_has_one_embedding_and_no_head_parameter(tmp_path):
    model = build(write_config(tmp_path, "llama", tie_word_embeddings=True))
    assert [name for name, _ in model.named_parameters() if "embed" in name or "head" in name] == [
        "model.embed_tokens.weight"
    ]


def test_a_config_is_fitted_to_its_tokenizer(tmp_path):
    path = str(write_config(tmp_path, "llama"))
    with pytest.raises(UserError, match="321 ids"):
        load_hf_config(path, tokenizer=FakeTokenizer(321))
    _, config = load_hf_config(path, tokenizer=FakeTokenizer(321), grow_vocab=True)
    assert config.vocab_size == 384
    assert config.eos_token_id == 256


def test_an_unknown_model_type_is_rejected_with_the_known_ones(tmp_path):
    path = tmp_path / "model.json"
    path.write_text('{"model_type": "perceptron"}')
    with pytest.raises(UserError) as error:
        load_hf_config(str(path))
    assert error.value.setting == f"{path}: model_type" and error.value.found == "'perceptron'"
    assert {"delta_net", "transformer"} <= set(error.value.allowed.replace(",", "").split())


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_give_the_loss_of_each_alone(name, tmp_path):
    model = build(write_config(tmp_path, name, initializer_range=0.2)).eval()
    first, second = torch.randint(0, 320, (1, 70)), torch.randint(0, 320, (1, 58))
    packed = torch.cat([first, second], dim=1).view(2, 64)  # the first document ends inside the second row
    positions = torch.cat([torch.arange(64), torch.arange(6), torch.arange(58)]).view(2, 64)
    boundaries = torch.tensor([0, 64, 70, 128], dtype=torch.int32)
    with torch.no_grad():
        alone = torch.cat([model(first[:, :64]), model(first[:, 64:]), model(second)], dim=1)
        together = model(packed, positions=positions, cu_seqlens=boundaries).view(1, 128, -1)
        leaking = model(packed).view(1, 128, -1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert (leaking[:, 70:] - alone[:, 70:]).abs().max() > 1e-2


@pytest.fixture
def flash_attn(monkeypatch):
    """flash-attn as transformers would find it installed; its functions are flame's references of them."""
    functions = (attention.flash_attn_func, attention.flash_attn_varlen_func, None, None, None)
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *_, **__: functions)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)


def packed_gradients(model, tokens, labels, **packing):
    model.zero_grad()
    loss = model(tokens, labels=labels, **packing)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", [n for n in (*distinct(), *OTHERS) if small(n)[0].packing == "positions"])
def test_flash_attn_keeps_the_documents_of_several_rows_apart(name, flash_attn):
    args = ModelArgs().bind(*small(name, initializer_range=0.2))
    model = CausalLM(args)
    model.init_weights()
    tokens, labels = torch.randint(0, 320, (2, 2, 64), generator=torch.Generator().manual_seed(0)).unbind()
    cuts = [0, 20, 64, 70, 128]  # documents begin within both rows, and the rows' own ends part two
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(cuts)]).view(2, 64)
    packing = {"positions": positions, "cu_seqlens": torch.tensor(cuts, dtype=torch.int32)}
    assert model.hf.config._attn_implementation == "sdpa"
    expected = packed_gradients(model, tokens, labels, **packing)

    model.hf.config._attn_implementation = "flash_attention_2"
    for given in (packing, {"positions": positions}):  # a pipeline's stage is not given the boundaries
        # other orders of the same fp32 sums
        torch.testing.assert_close(packed_gradients(model, tokens, labels, **given), expected, rtol=1e-4, atol=1e-4)
    for i, block in list(model.layers.items()):
        model.layers.register_module(i, checkpoint_wrapper(block))
    torch.testing.assert_close(packed_gradients(model, tokens, labels, **packing), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert (model(tokens) - model(tokens, **packing)).abs().max() > 1e-2  # rows whose documents see each other


# What some families add -----------------------------------------------------------------------------------------------


def gradients(model, tokens, labels):
    model.zero_grad()
    loss = model(tokens, labels=labels)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_the_routers_balance_is_in_the_loss_of_training_alone(tmp_path):
    path = tmp_path / "moe.json"
    path.write_text(json.dumps(fields_of("mixtral_8x7B", router_aux_loss_coef=0.5)))
    model = build(path)
    tokens, labels = torch.randint(0, 320, (2, 2, 64)).unbind()
    labels[0, :50] = -100
    output = transformers_model(model).train()(tokens, use_cache=False)
    plain = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    valid = (labels != -100).sum()
    torch.testing.assert_close(model.train()(tokens, labels=labels), plain + 0.5 * output.aux_loss * valid)
    torch.testing.assert_close(model.eval()(tokens, labels=labels), plain)


@pytest.mark.parametrize("name", ["mixtral_8x7B", "granitemoe"])
def test_activation_checkpointing_leaves_the_routers_gradients_as_they_are(name, tmp_path):
    path = tmp_path / "moe.json"
    path.write_text(json.dumps(fields_of(name)))
    model = build(path)
    tokens, labels = torch.randint(0, 320, (2, 2, 64)).unbind()
    before = gradients(model, tokens, labels)
    for i, block in list(model.layers.items()):
        model.layers.register_module(i, checkpoint_wrapper(block))
    after = gradients(model, tokens, labels)
    assert before[0] == after[0]
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))


def test_l2warp_adds_the_gradient_of_the_largest_logits_and_not_to_the_loss(tmp_path):
    batch = torch.randint(0, 320, (2, 2, 64))
    loss, plain = gradients(build(write_config(tmp_path, "gla")), *batch)
    same, pulled = gradients(build(write_config(tmp_path, "gla", use_l2warp=True)), *batch)
    assert same == loss
    assert max((a - b).abs().max() for a, b in zip(plain, pulled, strict=True)) > 1e-4

    hidden, weight = 30 * torch.randn(1, 8, 16), torch.randn(32, 16)
    labels = torch.randint(0, 32, (1, 8))
    found = []
    for warp in (False, True):
        x = hidden.clone().requires_grad_()
        linear_cross_entropy(x, weight, labels, l2warp=warp).backward()
        found.append(x.grad)
    logits = hidden @ weight.T
    largest = logits.max(-1)
    torch.testing.assert_close(found[1] - found[0], 1e-4 * largest.values[..., None] * weight[largest.indices])


def test_weights_are_float32_whatever_the_config_says(tmp_path):
    model = build(write_config(tmp_path, "llama", dtype="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_falcons_mask_lets_no_token_see_another_document_or_the_future(tmp_path):
    positions = torch.tensor([[0, 1, 0, 1, 2]])
    assert _document_mask(positions)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def test_whether_documents_are_packed_is_not_asked_of_the_device():
    positions = torch.arange(6, device="meta").expand(2, 6)  # a device that answers nothing
    for packed in (False, True):
        with known_packing(packed):
            found = masking_utils.find_packed_sequence_indices(positions)
        assert (None if found is None else found.shape) == ((2, 6) if packed else None)


def test_a_pipelines_last_stage_applies_no_embedding_dropout(tmp_path):
    model = build(write_config(tmp_path, "gpt_neox", hidden_dropout=0.5)).train()
    model.keep_stage({"norm", "output"}, {"1": model.layers["1"]})
    given, seen = torch.ones(2, 16, 64), []
    model.layers["1"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(given, labels=torch.zeros(2, 16, dtype=torch.long))
    assert torch.equal(seen[0], given)
