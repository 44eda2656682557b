"""Published weights are read as transformers reads them, or refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from flame.checkpoint.structure import Structure
from flame.convert.hf_weights import read_weights
from flame.convert.safetensors_file import find_files, read_header
from flame.errors import UserError

TABLE = torch.arange(32.0).view(8, 4)
TIED = Structure({"embed": ("float32", (8, 4))}, shared={"head": "embed"})


def test_a_whole_file_goes_before_an_index_that_was_left_behind(tmp_path):
    save_file({"embed": TABLE}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"embed": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in find_files(tmp_path)] == ["model-00001-of-00001.safetensors"]
    save_file({"embed": TABLE}, tmp_path / "model.safetensors")
    assert [path.name for path in find_files(tmp_path)] == ["model.safetensors"]


def test_a_tied_tensor_that_is_there_twice_must_be_the_same(tmp_path):
    save_file({"embed": TABLE, "head": TABLE.clone()}, tmp_path / "model.safetensors")
    assert list(read_weights(tmp_path, TIED).entries) == ["embed"]
    save_file({"embed": TABLE, "head": TABLE + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="head is not embed, which the config ties it to"):
        read_weights(tmp_path, TIED)
    save_file({"head": TABLE}, tmp_path / "model.safetensors")  # as transformers takes it too
    assert list(read_weights(tmp_path, TIED).entries) == ["embed"]


def test_further_names_of_a_tied_tensor_that_is_not_there_itself_are_compared_too(tmp_path):
    twice = Structure(TIED.tensors, shared={"head": "embed", "decoder": "embed"})
    save_file({"head": TABLE, "decoder": TABLE.clone()}, tmp_path / "model.safetensors")
    assert list(read_weights(tmp_path, twice).entries) == ["embed"]
    save_file({"head": TABLE, "decoder": TABLE + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"(head|decoder) is not embed, which the config ties it to"):
        read_weights(tmp_path, twice)


def test_bytes_before_the_first_are_not_read(tmp_path):
    header = json.dumps({"embed": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_header(tmp_path / "model.safetensors")
