import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from flame.checkpoint.structure import ConversionError, whole
from flame.convert.conversion import convert_dcp_to_hf, convert_hf_to_dcp
from flame.convert.dcp_file import read_tensors
from flame.convert.dcp_writer import write_checkpoint
from flame.convert.report import sha256
from flame.convert.safetensors_file import check_file, find_files, lay_out, read_header, write_file
from flame.errors import UserError
from tests.launch import environment

MODEL = {
    "model.embed.weight": torch.randn(8, 4),
    "model.norm.weight": torch.ones(4),
    "model.n": torch.tensor([3]),
    "model.flag": torch.tensor(True),
    "model.none": torch.empty(0, 3),
}


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint as torchtitan lays it out: the model at the top level, the rest under prefixes."""
    rest = {"optimizer": {"state.model.embed.weight.exp_avg": torch.ones(8, 4)}, "train_state": {"step": 3}}
    dcp.save({**MODEL, **rest}, checkpoint_id=str(tmp_path / "step-3"), no_dist=True)
    (tmp_path / "hf").mkdir()
    return tmp_path / "step-3"


def test_the_models_tensors_alone_are_written_bit_for_bit(checkpoint, tmp_path):
    advanced = []
    digests = convert_dcp_to_hf(read_tensors(checkpoint), tmp_path / "hf", advance=advanced.append)
    assert list(digests) == [file.name for file in (tmp_path / "hf").iterdir()] == ["model.safetensors"]
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert written.keys() == MODEL.keys()
    assert all(torch.equal(written[name], MODEL[name]) for name in MODEL)
    assert sum(advanced) == sum(tensor.nbytes for tensor in MODEL.values())


def test_shards_have_an_index_and_a_cast_leaves_integers_alone(checkpoint, tmp_path):
    out = tmp_path / "hf"
    convert_dcp_to_hf(read_tensors(checkpoint), out, "bfloat16", shard_bytes=64)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    written = {k: v for file in find_files(out) for k, v in load_file(file).items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in written.values())
    assert written["model.n"].dtype == torch.int64
    assert torch.equal(written["model.embed.weight"], MODEL["model.embed.weight"].bfloat16())


@pytest.mark.parametrize("piece_bytes", [1, 40, 1 << 20])
def test_torch_loads_what_is_written_from_safetensors_whatever_the_pieces(piece_bytes, tmp_path):
    save_file(MODEL, tmp_path / "model.safetensors")
    entries = read_header(tmp_path / "model.safetensors")
    shapes = {name: entry.shape for name, entry in entries.items()}
    parts = {name: whole(name, shape) for name, shape in shapes.items()}
    write_checkpoint(entries, parts, shapes, tmp_path / "step-0", piece_bytes=piece_bytes)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in MODEL.items()}
    dcp.load(loaded, checkpoint_id=str(tmp_path / "step-0"), no_dist=True)
    assert all(torch.equal(loaded[name], MODEL[name]) for name in MODEL)
    dcp_to_torch_save(str(tmp_path / "step-0"), str(tmp_path / "all.pt"))
    assert torch.load(tmp_path / "all.pt").keys() == MODEL.keys()


def test_what_was_written_is_read_again(tmp_path):
    save_file(MODEL, tmp_path / "model.safetensors")
    entries = read_header(tmp_path / "model.safetensors")

    def spoil(count):  # the last call comes after every tensor was written
        calls.append(count)
        with open(tmp_path / "model.safetensors", "r+b") as file:
            file.seek(entries["model.norm.weight"].start)
            file.write(bytes([len(calls)] * 4))

    calls = []
    with pytest.raises(ConversionError, match=r"model\.norm\.weight reads back as other bytes"):
        convert_hf_to_dcp(entries, tmp_path / "step-0", advance=spoil)


def test_a_written_file_is_read_again(tmp_path):
    file, tensor = tmp_path / "model.safetensors", np.zeros(5000, np.uint32)
    header, entries = lay_out(file, {"a": ("float32", (5000,)), "b": ("float32", (5000,))})

    checksums = write_file(file, header, entries, lambda name: [tensor[:1000], tensor[1000:]])
    assert check_file(file, header, entries, checksums) == sha256(file)
    with open(file, "r+b") as stream:
        stream.seek(entries["b"].start)
        stream.write(b"spoiled")
    with pytest.raises(ConversionError, match=r"model\.safetensors: b reads back as other bytes"):
        check_file(file, header, entries, checksums)


def test_a_conversion_loads_neither_torch_nor_transformers():
    imports = "import sys, flame.convert.export, flame.convert.verify"
    code = f"{imports}; print({{'torch', 'transformers'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


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
def test_a_file_that_is_no_whole_safetensors_file_is_one_line(content, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.safetensors: not a whole safetensors file"):
        read_header(tmp_path / "a.safetensors")


def test_a_folder_with_pickles_or_nothing_says_what_is_needed(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"found pytorch_model\.bin, must hold model\.safetensors"):
        find_files(tmp_path)
    for index in ("{", "[]", '{"weight_map": 3}'):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(UserError, match=r"index\.json: not an index of safetensors"):
            find_files(tmp_path)
