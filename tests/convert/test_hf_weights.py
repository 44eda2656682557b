"""Published weights are read as transformers reads them, or rejected."""

import pytest
import torch
from safetensors.torch import save_file

from flame.checkpoint.structure import Structure
from flame.convert.hf_weights import check_weights, read_weights
from flame.convert.safetensors_file import find_files
from flame.errors import UserError

TABLE = torch.arange(32.0).view(8, 4)
TIED = Structure({"embed": ("float32", (8, 4))}, shared={"head": "embed"})


def placed(folder, structure):
    """The tensors of the model that a folder has weights for, once they are checked."""
    weights = read_weights(find_files(folder), structure)
    check_weights(weights, folder)
    return [published.tensor for _, published in weights.placed()]


def test_a_tied_tensor_that_is_there_twice_must_be_the_same(tmp_path):
    save_file({"embed": TABLE, "head": TABLE.clone()}, tmp_path / "model.safetensors")
    assert placed(tmp_path, TIED) == ["embed"]
    save_file({"embed": TABLE, "head": TABLE + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="head is not embed, which the config ties it to"):
        placed(tmp_path, TIED)
    save_file({"head": TABLE}, tmp_path / "model.safetensors")  # as transformers takes it too
    assert placed(tmp_path, TIED) == ["embed"]


def test_further_names_of_a_tied_tensor_that_is_not_there_itself_are_compared_too(tmp_path):
    twice = Structure(TIED.tensors, shared={"head": "embed", "decoder": "embed"})
    save_file({"head": TABLE, "decoder": TABLE.clone()}, tmp_path / "model.safetensors")
    assert placed(tmp_path, twice) == ["embed"]
    save_file({"head": TABLE, "decoder": TABLE + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"(head|decoder) is not embed, which the config ties it to"):
        placed(tmp_path, twice)
