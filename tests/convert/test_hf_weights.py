"""Published weights are read as transformers reads them, or rejected."""

from pathlib import Path

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import load_file, save_file

from flame.checkpoint.structure import Structure
from flame.convert.hf_weights import check_weights, find_folder, read_weights
from flame.convert.safetensors_file import find_files
from flame.errors import UserError
from tests.convert.models import publish, structure_of

TABLE = torch.arange(32.0).view(8, 4)
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


def test_a_hub_id_is_the_folder_in_which_huggingface_hub_keeps_it():
    kept = Path(HF_HUB_CACHE, "models--org--name")
    for file, content in (("refs/main", "abc"), ("snapshots/abc/model.safetensors", "")):
        (kept / file).parent.mkdir(parents=True)
        (kept / file).write_text(content)
    assert find_folder("org/name") == kept / "snapshots" / "abc"
