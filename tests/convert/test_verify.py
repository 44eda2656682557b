"""Both conversions and their verification, for a tiny model of each family."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from flame.checkpoint.structure import ConversionError
from flame.convert.export import export_checkpoint
from flame.convert.hf_structure import model_structure, read_structure
from flame.convert.hf_to_dcp import convert_hf_to_dcp
from flame.convert.hf_weights import read_weights
from flame.convert.output import read_report
from flame.convert.safetensors_file import find_files
from flame.convert.verify import LOGITS_BYTES, export_and_verify, too_large, verify_export
from flame.models.hf import build_on_meta, read_config
from tests.convert.models import CASES, build, publish, save_run
from tests.layouts import MODELS


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_a_published_model_comes_back_bit_for_bit_and_with_its_logits(name, tied, tmp_path):
    published = publish(tmp_path / "hf", name, tie_word_embeddings=tied)
    (file,) = find_files(tmp_path / "hf")
    structure = read_structure(tmp_path / "hf")
    convert_hf_to_dcp(read_weights([file], structure), tmp_path / "step-0")

    trained, _ = build(tmp_path, name, tie_word_embeddings=tied)
    dcp.load(trained.state_dict(), checkpoint_id=str(tmp_path / "step-0"), no_dist=True)
    tokens = torch.randint(0, 257, (2, 96))
    with torch.no_grad():
        logits = published(tokens, use_cache=False).logits
        assert torch.equal(trained(tokens), logits)

    assert export_and_verify(tmp_path / "step-0", tmp_path / "hf", tmp_path / "back")
    assert read_report(tmp_path / "back")["checks"]["logits"]["max_abs_difference"] == 0
    first, second = load_file(file), load_file(tmp_path / "back" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)


MIXTRAL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 3,
    "vocab_size": 40,
}


def test_experts_are_one_tensor_in_training_and_many_when_published(tmp_path):
    published = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **MIXTRAL))
    published.save_pretrained(tmp_path / "hf")
    first = load_file(tmp_path / "hf" / "model.safetensors")
    assert "model.layers.1.block_sparse_moe.experts.2.w3.weight" in first
    structure = read_structure(tmp_path / "hf")
    convert_hf_to_dcp(read_weights(find_files(tmp_path / "hf"), structure), tmp_path / "step-0")
    trained = {name: torch.zeros_like(tensor) for name, tensor in published.state_dict().items()}
    dcp.load(trained, checkpoint_id=str(tmp_path / "step-0"), no_dist=True)
    assert all(torch.equal(trained[name], tensor) for name, tensor in published.state_dict().items())

    dcp.save(trained, checkpoint_id=str(tmp_path / "step-1"), no_dist=True)
    for step in ("step-0", "step-1"):
        out = tmp_path / "out" / step
        export_checkpoint(tmp_path / step, tmp_path / "hf", out, published_as=structure.published_as)
        second = load_file(out / "model.safetensors")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a llama and its export, which the tests below make another model."""
    folder = tmp_path_factory.mktemp("run")
    save_run(folder, "llama")
    export_checkpoint(folder / "checkpoint" / "step-1", folder / "model", folder / "hf")
    return folder


@pytest.fixture
def spoiled(run):
    """Changes the tensors of the export as asked; afterwards they are as they were."""
    file = run / "hf" / "model.safetensors"
    before = file.read_bytes()

    def change(**tensors):
        state = {**load_file(file), **{f"model.{name}.weight": tensor for name, tensor in tensors.items()}}
        save_file({name: t for name, t in state.items() if t is not None}, file, metadata={"format": "pt"})

    yield change
    file.write_bytes(before)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"norm": None}, r"missing: model\.norm\.weight"),
        ({"norm": None, "norms": torch.ones(64)}, r"missing: model\.norm\.weight\n  unexpected: model\.norms\.weight"),
        ({"norm": torch.ones(32)}, r"shape: model\.norm\.weight has \[32\], the config says \[64\]"),
        ({"norm": torch.ones(64, dtype=torch.int64)}, r"dtype: model\.norm\.weight has int64"),
    ],
)
def test_tensors_other_than_the_configs_are_rejected_by_name(run, spoiled, changes, text):
    spoiled(**changes)
    with pytest.raises(ConversionError, match=text):
        verify_export(run / "checkpoint" / "step-1", None, run / "hf")


def test_an_export_with_other_values_gives_other_logits_and_is_rejected(run, spoiled):
    queries = load_file(run / "hf" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    spoiled(**{"layers.0.self_attn.q_proj": queries.roll(1, 0)})
    with pytest.raises(ConversionError, match="its logits differ from the training forward's"):
        verify_export(run / "checkpoint" / "step-1", None, run / "hf")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_cast_is_compared_with_the_weights_rounded_in_the_same_way(run, dtype, tmp_path):
    checkpoint = run / "checkpoint" / "step-1"
    export_checkpoint(checkpoint, run / "model", tmp_path / "hf", dtype)
    found = verify_export(checkpoint, dtype, tmp_path / "hf")["logits"]
    assert found["max_abs_difference"] == 0
    assert ("change_by_the_cast" in found) == (dtype != "float32")
    assert found.get("change_by_the_cast", 1) > 0


def test_the_logits_of_a_large_model_are_not_compared():
    assert "not compared" in too_large({"weight": ("bfloat16", (LOGITS_BYTES // 4 + 1,))})
    assert too_large({"weight": ("bfloat16", (LOGITS_BYTES // 4,))}) is None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_expected_tensors_are_those_that_training_saves(name, tied, tmp_path):
    model, _ = build(tmp_path, name, tie_word_embeddings=tied)
    _, config = read_config(model.hf.config.to_dict(), "a config")
    structure = model_structure(build_on_meta(config, "a config"))
    assert structure.tensors == {key: ("float32", tuple(tensor.shape)) for key, tensor in model.state_dict().items()}
    assert bool(structure.shared) == tied
