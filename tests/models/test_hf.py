"""Configs that transformers takes and a run would fall over, and those that only look like it."""

import pytest
import torch

from flame.config.parser import parse
from flame.errors import UserError
from flame.models.attention import rotary_attention_flops
from flame.models.hf import build_on_meta, read_config, validate_seq_len
from tests.models.small import OTHERS, distinct, fields_of, small

LEARNED = {
    "gpt2": fields_of("gpt2", n_positions=64),
    "biogpt": {**OTHERS["qwen2"], "model_type": "biogpt", "max_position_embeddings": 64},
    "gptj": {**fields_of("gpt2", n_positions=64, rotary_dim=8), "model_type": "gptj"},
}


@pytest.mark.parametrize("name", LEARNED)
def test_rows_longer_than_a_table_of_positions_are_rejected_and_rows_as_long_run(name):
    model = build_on_meta(read_config(LEARNED[name], name)[1], name)
    validate_seq_len(model, parse(["--training.seq_len=64"]))
    for flags, setting, found in (
        (["--training.seq_len=65"], "--training.seq_len", 65),
        (["--training.seq_len=64", "--validation.enable", "--validation.seq_len=80"], "--validation.seq_len", 80),
        (["--training.seq_len=99", "--training.varlen"], "--training.context_len", 99),
    ):
        with pytest.raises(UserError) as error:
            validate_seq_len(model, parse(flags))
        assert (error.value.setting, error.value.found, error.value.allowed) == (setting, found, "at most 64")
    validate_seq_len(model, parse(["--training.seq_len=99", "--training.varlen", "--training.context_len=64"]))

    real = type(model)(model.config).eval()
    real(input_ids=torch.ones(1, 64, dtype=torch.long), use_cache=False)
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):  # what a run would end with
        real(input_ids=torch.ones(1, 65, dtype=torch.long), use_cache=False)


@pytest.mark.parametrize("name", [*distinct(), *OTHERS])
def test_no_table_of_tokens_is_taken_for_one_of_positions(name):
    config = small(name, max_position_embeddings=320)[1]  # as many as tokens
    validate_seq_len(build_on_meta(config, name), parse(["--training.seq_len=2048"]))


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
