"""An export's AutoTokenizer gives the ids that were trained on, whatever class the model's family has."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flame.checkpoint.structure import ConversionError
from flame.convert.output import read_report
from flame.convert.tokenizer import compare_tokenizer, settle_tokenizer
from flame.convert.verify import export_and_verify
from flame.data.tokenize import build_tokenizer
from tests.convert.models import save_run

NUMBERS = [f"In {1000 + 7 * i} and {i * i * 31}, pi is 3.14159; caf\u00e9 \u65e5\u672c." for i in range(300)]


def learn():
    """A byte-pair encoding that takes digits three at a time and puts a BOS before a text."""
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(NUMBERS, trainer)
    backend.add_tokens([AddedToken("<|im|>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=learn(), bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return build_tokenizer(str(folder))


def export(folder, trained, model_type):
    trained.hf.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    settle_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


# Those whose class AutoTokenizer takes whatever an export says, and some whose class it does not.
@pytest.fixture(scope="module", params=["qwen2", "qwen3_5", "qwen3_5_moe", "qwen3", "llama", "gpt2", "gla"])
def exported(request, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return folder, export(folder, trained, request.param)


@settings(max_examples=60, deadline=None)
@given(text=st.text() | st.lists(st.sampled_from([*NUMBERS, "</s>", "<s>", "<|im|>", "e\u0301"])).map("".join))
def test_the_ids_of_any_text_are_those_of_training(exported, trained, text):
    _, hf = exported
    assert hf(text, add_special_tokens=False).input_ids == trained.encode(text)
    assert hf(text).input_ids == [0, *trained.encode(text)]


def test_the_comparison_finds_no_difference(exported):
    folder, _ = exported
    found = compare_tokenizer(folder)
    assert found["texts"] == 256 and found["ids"] > 20_000 and found["differences"] == 0


def test_the_comparison_finds_the_class_of_a_model(trained, tmp_path):
    export(tmp_path, trained, "qwen2")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["trust_remote_code"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match="AutoTokenizer"):
        compare_tokenizer(tmp_path)


def test_an_export_is_loaded_without_code_whether_or_not_it_is_trusted(exported, trained):
    folder, _ = exported
    hf = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert hf("1234567").input_ids == [0, *trained.encode("1234567")]
    assert len(hf) == trained.vocab_size and "auto_map" not in (folder / "tokenizer_config.json").read_text()


@pytest.mark.slow
def test_every_causal_model_of_transformers_keeps_the_ids(trained, tmp_path):
    expected = {text: [0, *trained.encode(text)] for text in NUMBERS[:5]}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - {"gemma4_assistant"}:  # whose defaults are invalid
        hf = export(tmp_path / model_type, trained, model_type)
        assert {text: hf(text).input_ids for text in expected} == expected, model_type


def test_a_tokenizer_that_cannot_encode_every_text_is_compared_on_what_it_can(tmp_path):
    backend = Backend(models.Unigram([("</s>", 0.0), *((chr(c), -1.0) for c in range(0x20, 0x7F))], unk_id=None))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    found = compare_tokenizer(tmp_path)
    assert found["ids"] > 1000 and found["differences"] == 0


def test_a_tokenizer_that_transformers_cannot_call_is_reported(trained, tmp_path):
    trained.hf.save_pretrained(tmp_path)
    names = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"model_max_length": "long"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    assert compare_tokenizer(tmp_path).startswith("not compared: '>'")


def test_what_is_not_there_is_reported(tmp_path):
    settle_tokenizer(tmp_path)
    assert compare_tokenizer(tmp_path) == "not compared: there is no tokenizer.json"


def test_the_report_of_an_export_has_the_comparison(tmp_path):
    save_run(tmp_path, "llama", model_type="qwen2")  # its class would normalize bytes
    export_and_verify(tmp_path / "checkpoint" / "step-1", tmp_path / "model", tmp_path / "hf")
    assert read_report(tmp_path / "hf")["checks"]["tokenizer"]["differences"] == 0
    hf = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert hf("e\u0301").input_ids == list("e\u0301".encode())
