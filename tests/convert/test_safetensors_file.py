"""safetensors files are written, read back and validated."""

import json
from hashlib import sha256

import pytest
import torch
from safetensors.torch import save_file

from flame.checkpoint.structure import ConversionError
from flame.convert.safetensors_file import check_file, find_files, read_header, write_file
from flame.errors import UserError

TABLE = torch.arange(32.0).view(8, 4)


def test_a_written_file_is_read_back(tmp_path):
    file = tmp_path / "model.safetensors"
    tensors = {"a": torch.arange(5), "b": torch.randn(50, 4, dtype=torch.bfloat16), "c": torch.tensor(2.0)}
    specs = {name: (str(tensor.dtype)[6:], tuple(tensor.shape)) for name, tensor in tensors.items()}
    digest = write_file(file, specs, tensors.__getitem__)
    assert digest == sha256(file.read_bytes()).hexdigest()
    check_file(file, digest)
    assert {name: (entry.dtype, entry.shape) for name, entry in read_header(file).items()} == specs
    assert all(torch.equal(entry.read(), tensors[name]) for name, entry in read_header(file).items())
    assert torch.equal(read_header(file)["b"].read(((3, 9), (1, 2))), tensors["b"][3:9, 1:2])
    with open(file, "r+b") as stream:
        stream.seek(-3, 2)
        stream.write(b"!")
    with pytest.raises(ConversionError, match=r"model\.safetensors reads back as other bytes"):
        check_file(file, digest)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        b"\2\0\0\0\0\0\0\0{}"[:9],
        b'\x41\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}           1234',
        b'\x41\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}           1234',
    ],
)
def test_a_file_that_is_not_a_whole_safetensors_file_is_rejected(content, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="must be a whole safetensors file") as error:
        read_header(tmp_path / "a.safetensors")
    assert error.value.setting == str(tmp_path / "a.safetensors")


def test_a_folder_of_pickles_or_without_an_index_is_rejected(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"must be a folder with model\.safetensors") as error:
        find_files(tmp_path)
    assert (error.value.setting, error.value.found) == (str(tmp_path), "pytorch_model.bin")
    for index in ("{", "[]", '{"weight_map": 3}'):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(UserError, match="must be an index of safetensors"):
            find_files(tmp_path)


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors"])
def test_an_index_of_files_elsewhere_is_rejected(file, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UserError, match=f"found {file}, must be an index of files in its own folder"):
        find_files(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_link_to_nothing_is_said_to_be_one(name, tmp_path):
    (tmp_path / name).symlink_to("absent")
    with pytest.raises(UserError, match=f"{name}: found a link to nothing, .* must be a regular file"):
        find_files(tmp_path)


def test_offsets_before_the_first_byte_are_rejected(tmp_path):
    header = json.dumps({"embed": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="a whole safetensors file"):
        read_header(tmp_path / "model.safetensors")


def test_a_whole_file_is_preferred_to_a_stale_index(tmp_path):
    save_file({"embed": TABLE}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"embed": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in find_files(tmp_path)] == ["model-00001-of-00001.safetensors"]
    save_file({"embed": TABLE}, tmp_path / "model.safetensors")
    assert [path.name for path in find_files(tmp_path)] == ["model.safetensors"]
