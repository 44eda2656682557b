"""Published weights are read as transformers reads them, or rejected."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from flame.checkpoint.structure import Structure
from flame.convert.hf_weights import check_weights, find_folder, read_weights
from flame.convert.safetensors_file import INDEX, find_files
from flame.errors import UserError
from tests.convert.models import publish, structure_of

TABLE = torch.arange(32.0).view(8, 4)
SMALL_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 704}
TIED = Structure({"embed": ("float32", (8, 4))}, shared={"head": "embed"})


def placed(folder, structure):
    """The tensors of the model that a folder has weights for, once they are checked."""
    weights = read_weights(find_files(folder), structure)
    check_weights(weights, folder)
    return [published.tensor for _, published in weights.placed()]


def test_two_copies_of_a_tied_tensor_must_be_equal(tmp_path):
    save_file({"embed": TABLE, "head": TABLE.clone()}, tmp_path / "model.safetensors")
    assert placed(tmp_path, TIED) == ["embed"]
    save_file({"embed": TABLE, "head": TABLE + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="head is not embed, which the config ties it to"):
        placed(tmp_path, TIED)
    save_file({"head": TABLE}, tmp_path / "model.safetensors")  # as transformers takes it too
    assert placed(tmp_path, TIED) == ["embed"]


def test_further_names_of_a_tied_tensor_are_compared_without_the_first(tmp_path):
    twice = Structure(TIED.tensors, shared={"head": "embed", "decoder": "embed"})
    save_file({"head": TABLE, "decoder": TABLE.clone()}, tmp_path / "model.safetensors")
    assert placed(tmp_path, twice) == ["embed"]
    save_file({"head": TABLE, "decoder": TABLE + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"(head|decoder) is not embed, which the config ties it to"):
        placed(tmp_path, twice)


def test_names_that_transformers_ignores_are_ignored(tmp_path):
    publish(tmp_path / "hf", "gpt_neox")
    file = tmp_path / "hf" / "model.safetensors"
    old = {
        f"gpt_neox.layers.0.attention.{name}": torch.ones(3) for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
    }
    save_file({**load_file(file), **old}, file)
    assert not old.keys() & read_weights(find_files(tmp_path / "hf"), structure_of(tmp_path / "hf")).entries.keys()


@pytest.mark.parametrize("spelled", [{}, {"transformer.": ""}], ids=["as saved", "of the backbone alone"])
@pytest.mark.parametrize("shard", ["10MB", "50KB"])
def test_the_weights_of_a_backbone_alone_and_old_masks_are_read_as_transformers_reads_them(tmp_path, spelled, shard):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **SMALL_GPT2))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    files = find_files(tmp_path)
    for number, file in enumerate(files):
        tensors = {name: tensor for name, tensor in load_file(file).items() if name != "lm_head.weight"}
        tensors = {name.replace(*item): t for name, t in tensors.items() for item in spelled.items() or [("", "")]}
        if number == 0:
            tensors |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e4)}
        save_file(tensors, file, metadata={"format": "pt"})
    if len(files) > 1:
        index = {"weight_map": {name: file.name for file in files for name in load_file(file)}}
        (tmp_path / INDEX).write_bytes(b"\xef\xbb\xbf" + json.dumps(index).encode())
    assert sorted(placed(tmp_path, structure_of(tmp_path))) == sorted(structure_of(tmp_path).tensors)
    weights = read_weights(find_files(tmp_path), structure_of(tmp_path))
    for entry, published in weights.placed():
        assert torch.equal(entry.read(), model.state_dict()[published.tensor])


def test_weights_of_a_wrapped_model_are_rejected_with_a_name_of_each_kind(tmp_path):
    save_file({"module.embed": TABLE, "module.head": TABLE + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        placed(tmp_path, Structure(dict.fromkeys(("embed", "head", "norm", "bias"), ("float32", (8, 4)))))
    assert "missing: embed" in error.value.hint and "unexpected: module.embed" in error.value.hint


def test_a_hub_id_is_the_folder_in_which_huggingface_hub_keeps_it():
    kept = Path(HF_HUB_CACHE, "models--org--name")
    for file, content in (("refs/main", "abc"), ("snapshots/abc/model.safetensors", "")):
        (kept / file).parent.mkdir(parents=True)
        (kept / file).write_text(content)
    assert find_folder("org/name") == kept / "snapshots" / "abc"
