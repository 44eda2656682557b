"""Configs that transformers takes and a run would fall over, and those that only look like it."""

import json
import logging

import pytest
import torch
from transformers import GenerationConfig

from flame.config.parser import parse
from flame.data.tokenize import build_tokenizer
from flame.errors import UserError
from flame.models.attention import rotary_attention_flops
from flame.models.hf import (
    build_on_meta,
    fit_positions,
    load_hf_config,
    read_config,
    read_fields,
    read_generation,
    save_assets,
    warn_of_unknown,
)
from tests.models.small import OTHERS, distinct, fields_of, small

LEARNED = {
    "gpt2": fields_of("gpt2", n_positions=64),
    "biogpt": {**OTHERS["qwen2"], "model_type": "biogpt", "max_position_embeddings": 64},
    "gptj": {**fields_of("gpt2", n_positions=64, rotary_dim=8), "model_type": "gptj"},
}


@pytest.mark.parametrize("name", LEARNED)
def test_rows_longer_than_a_table_of_positions_are_rejected_and_rows_as_long_run(name):
    model = build_on_meta(read_config(LEARNED[name], name)[1], name)
    fit_positions(model, parse(["--training.seq_len=64"]))
    for flags, setting, found in (
        (["--training.seq_len=65"], "--training.seq_len", 65),
        (["--training.seq_len=64", "--validation.enable", "--validation.seq_len=80"], "--validation.seq_len", 80),
        (["--training.seq_len=99", "--training.varlen"], "--training.context_len", 99),
    ):
        with pytest.raises(UserError) as error:
            fit_positions(model, parse(flags))
        assert (error.value.setting, error.value.found, error.value.allowed) == (setting, found, "at most 64")
    fit_positions(model, parse(["--training.seq_len=99", "--training.varlen", "--training.context_len=64"]))

    real = type(model)(model.config).eval()
    real(input_ids=torch.ones(1, 64, dtype=torch.long), use_cache=False)
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):  # what a run would end with
        real(input_ids=torch.ones(1, 65, dtype=torch.long), use_cache=False)


@pytest.mark.parametrize("name", [*distinct(), *OTHERS])
def test_no_table_of_tokens_is_taken_for_one_of_positions(name):
    config = small(name, max_position_embeddings=320)[1]  # as many as tokens
    fit_positions(build_on_meta(config, name), parse(["--training.seq_len=2048"]))


GEMMA4 = {"head_dim": 16, "global_head_dim": 32, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 16}


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma4_unified_text"])
def test_a_config_whose_layers_differ_is_read_layer_by_layer(model_type):
    fields = {**OTHERS["qwen2"], **GEMMA4, "model_type": model_type, "sliding_window": 8}
    family, config = read_config(fields, model_type)
    # the first block slides over 8 tokens with heads of 16, the last sees all with heads of 32
    assert rotary_attention_flops(config, 64) == 4 * 4 * 16 * (8 - 64 / 128) + 4 * 4 * 32 * 32
    assert isinstance(family.tp_plan, str) and "its layers differ in head_dim" in family.tp_plan
    with pytest.raises(UserError) as error:
        read_config(fields | {"num_key_value_heads": 3}, model_type)
    assert error.value.setting.endswith(": num_key_value_heads") and error.value.found == 3


@pytest.mark.parametrize(
    "name, field, value, setting, rule",
    [
        ("gla_340M", "vocab_size", None, "vocab_size", "an integer, 1 or more"),
        ("gla_340M", "num_heads", 0, "num_heads", "an integer, 1 or more"),
        ("retnet_340M", "hidden_size", 0, "hidden_size", "an integer, 1 or more"),
        ("falcon_7B", "num_key_value_heads", "4", "num_key_value_heads", "an integer, 1 or more"),
        ("rwkv6", "num_key_value_heads", {}, "num_key_value_heads", "an integer, 1 or more"),
        ("mixtral_8x7B", "num_local_experts", [[]], "num_local_experts", "an integer, 0 or more"),
        ("mixtral_8x7B", "num_local_experts", 2**31, "num_local_experts", "below 2^31"),
        ("mixtral_8x7B", "num_local_experts", 2**20, "num_local_experts", "at most 65536 in each of 2 layers"),
        ("llama_7B", "sliding_window", {}, "sliding_window", "an integer, 0 or more"),
        ("llama_7B", "num_hidden_layers", 10**9, "num_hidden_layers", "an integer from 1 to 4096"),
        ("llama_7B", "num_hidden_layers", 2**63, "num_hidden_layers", "an integer from 1 to 4096"),
        ("llama_7B", "num_hidden_layers", True, "num_hidden_layers", "an integer from 1 to 4096"),
        ("llama_7B", "num_attention_heads", 4.5, "num_attention_heads", "an integer"),
        ("llama_7B", "eos_token_id", ["</s>"], "eos_token_id", "an id, or a list of ids"),
        ("llama_7B", "head_dim", 9, "head_dim", "even"),
        ("pythia_160M", "rotary_pct", 7.0, "partial_rotary_factor", "more than 0 and at most 1"),
        ("falcon_40B", "num_kv_heads", 3, "num_kv_heads", "a divisor of num_attention_heads, 4"),
        ("transformer_340M", "num_heads", 7, "num_heads", "a divisor of hidden_size, 64"),
        ("pythia_160M", "attention_dropout", -1, "attention_dropout", "from 0 to 1"),
        ("gpt2", "embd_pdrop", 1e30, "embd_pdrop", "from 0 to 1"),
        ("gpt2", "n_embd", 0, "n_embd", "an integer, 1 or more"),
    ],
)
def test_a_number_that_no_model_can_have_is_rejected_by_its_name(name, field, value, setting, rule):
    fields = fields_of(name) | {field: value}
    with pytest.raises(UserError) as error:
        build_on_meta(read_config(fields, "m.json")[1], "m.json")
    problem = error.value
    assert problem.setting in (f"m.json: {setting}", "--model.config")  # transformers' own class may reject it first
    assert problem.setting == "--model.config" or rule in problem.allowed


def test_a_model_of_which_a_parameter_is_empty_is_rejected():
    with pytest.raises(UserError) as error:
        build_on_meta(read_config(fields_of("granitemoe") | {"num_local_experts": 0}, "m.json")[1], "m.json")
    assert error.value.setting == "--model.config" and "has no elements" in error.value.hint


@pytest.mark.parametrize(
    "fields",
    [
        {**LEARNED["gptj"], "rotary_dim": 64},  # of heads of 16
        {
            **OTHERS["qwen2"],
            "model_type": "deepseek_v3",
            "head_dim": 8,
            "qk_rope_head_dim": 64,
            "first_k_dense_replace": 9,
        },
    ],
    ids=["gptj", "deepseek_v3"],
)
def test_sizes_that_contradict_each_other_are_rejected_before_a_model_is_trained(fields):
    with pytest.raises(UserError) as error:
        read_config(fields, "m.json")
    assert error.value.setting == "--model.config" and error.value.hint.startswith("cannot run: RuntimeError")


def test_what_transformers_says_of_a_config_is_logged_once_it_is_taken(monkeypatch):
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    taken = fields_of("gpt2") | {"bos_token_id": 999, "eos_token_id": 1}
    read_config(taken, "m.json")
    assert len(said) == 1 and "bos_token_id" in said.pop()
    with pytest.raises(UserError):
        read_config(taken | {"n_head": 3, "bos_token_id": 998}, "m.json")
    assert not said


def test_slots_that_are_left_to_fla_are_counted():
    family, config = read_config(fields_of("gsa_340M") | {"num_slots": None}, "gsa")
    heads = build_on_meta(config, "gsa").model.layers[0].attn.num_slots
    assert family.mixer_flops(config, 64) == family.mixer_flops(
        read_config(fields_of("gsa_340M") | {"num_slots": heads}, "")[1], 64
    )


def test_a_config_may_begin_with_a_byte_order_mark_and_be_in_a_folder(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(fields_of("qwen2")).encode())
    assert read_fields(str(tmp_path)) == read_fields(str(tmp_path / "config.json")) == fields_of("qwen2")


@pytest.mark.parametrize("text", ["[" * 50_000, '{"a":' * 50_000, "{", "[1]", ""])
def test_a_config_that_is_no_json_object_is_rejected(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as error:
        read_fields(str(tmp_path))
    assert error.value.setting == "--model.config" and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["llama_7B", "qwen2"])
def test_a_config_may_have_several_ends_of_text(name):
    assert read_config(fields_of(name) | {"eos_token_id": [1, 106]}, name)[1].eos_token_id == [1, 106]


def test_a_field_that_nothing_knows_is_named_with_the_one_that_was_meant(tmp_path, caplog):
    fields = {**fields_of("gla_340M"), "torch_dtype": "bfloat16", "auto_map": {}, "tie_word_embeddings": False}
    (path := tmp_path / "m.json").write_text(json.dumps(fields))
    load_hf_config(str(path))
    assert "knows" not in caplog.text  # what any config of the hub may hold
    path.write_text(json.dumps(fields | {"hiden_size": 64, "x\ny": 1}))
    load_hf_config(str(path))
    said = "neither GLAConfig nor transformers knows hiden_size (did you mean hidden_size?), x\\ny"
    assert [r.getMessage() for r in caplog.records if "knows" in r.getMessage()] == [f"{path}: {said}"]


@pytest.mark.parametrize("name", [*distinct(), *OTHERS])
def test_no_field_of_a_config_that_transformers_writes_is_unknown(name, caplog):
    kind = type(small(name)[1])
    fields = kind().to_dict()
    warn_of_unknown(fields, kind.from_dict(fields), name)
    assert "knows" not in caplog.text


def test_a_quantized_config_is_one_of_the_weights_as_they_are(caplog):
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    config = read_config(fields_of("qwen2") | quantized, "m.json")[1]
    assert "quantization_config" not in config.to_dict() and "quantization_config is ignored" in caplog.text


def test_documents_are_not_kept_apart_by_alibi():
    fields = fields_of("falcon_7B") | {"alibi": True}
    assert read_config(fields, "falcon")[0].packing is None and read_config(fields | {"alibi": False}, "")[0].packing


GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [256, 7, 9], "pad_token_id": 7}


def saved(folder, fields, generation):
    """config.json and generation_config.json that a run of a model with these files saves, with the byte tokenizer."""
    (source := folder / "source").mkdir()
    (source / "config.json").write_text(json.dumps(fields))
    (source / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = build_tokenizer("byte")
    config = load_hf_config(str(source), tokenizer=tokenizer)[1]
    save_assets(folder / "out", build_on_meta(config, "source"), tokenizer.hf, read_generation(str(source)))
    assert GenerationConfig.from_pretrained(folder / "out").to_diff_dict().items() >= {"top_p": 0.9}.items()
    return [json.loads((folder / "out" / name).read_bytes()) for name in ("config.json", "generation_config.json")]


def test_an_export_generates_as_the_model_that_it_began_as(tmp_path):
    config, generation = saved(tmp_path, fields_of("qwen2", eos_token_id=[256, 7]), GENERATION | {"do_sample": False})
    assert config["eos_token_id"] == [256, 7]
    assert generation.items() >= (GENERATION | {"do_sample": False}).items()  # save_pretrained rejects it


def test_ids_of_another_tokenizer_are_not_kept(tmp_path):
    config, generation = saved(tmp_path, fields_of("qwen2", eos_token_id=[1, 3]), GENERATION | {"eos_token_id": [1, 3]})
    assert config["eos_token_id"] == generation["eos_token_id"] == 256
    assert "pad_token_id" not in generation and generation["temperature"] == 0.6


@pytest.mark.parametrize(
    "content", ["{", '{"cache_implementation": "bogus"}', '{"max_new_tokens": -3}', '{"watermarking_config": {"x": 1}}']
)
def test_a_generation_config_that_transformers_does_not_read_is_rejected(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError) as error:
        read_generation(str(tmp_path))
    assert error.value.setting == "--model.config" and "generation_config.json" in str(error.value)
    (tmp_path / "empty").mkdir()
    assert read_generation(str(tmp_path / "empty")) == {}


@pytest.mark.parametrize(
    "name, rope, flags, said",
    [
        ("llama_7B", "default", ["--training.seq_len=1024"], 1024),
        ("pythia_160M", "default", ["--training.seq_len=1024"], 1024),
        ("gla_340M", None, ["--training.seq_len=1024"], 1024),
        ("llama_7B", "default", ["--training.seq_len=128"], 256),
        ("llama_7B", "default", ["--training.seq_len=1024", "--training.varlen", "--training.context_len=300"], 300),
        ("llama_7B", "dynamic", ["--training.seq_len=1024"], 256),  # its angles depend on what the config says
    ],
)
def test_the_config_of_computed_positions_says_how_long_rows_are(name, rope, flags, said):
    changes = {"rope_parameters": {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0}} if rope else {}
    model = build_on_meta(read_config(fields_of(name) | {"max_position_embeddings": 256} | changes, name)[1], name)
    fit_positions(model, parse(flags))
    assert model.config.max_position_embeddings == said


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["somebody/kernel", {"": "somebody/kernel"}])
def test_a_kernel_of_the_hub_that_a_config_names_is_rejected(name, value):
    with pytest.raises(UserError) as error:
        read_config({**OTHERS["qwen2"], name: value}, "its config.json")
    assert error.value.setting == f"its config.json: {name}"
