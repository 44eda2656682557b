"""Checkpoints of any number of ranks in any layout are read as they were saved, and corruption is found."""

import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from flame.convert.dcp_file import CorruptedError, read_tensors
from flame.convert.export import convert_dcp_to_hf
from flame.errors import UserError
from tests.convert.sharded import network, tensors
from tests.launch import environment

PLAIN = [f"shard{dim}-{ranks}" for dim in (0, 1) for ranks in (1, 2, 4)] + ["both", "tp-replicated", "twice", "async"]
MODULES = ["fsdp-1", "fsdp-2", "fsdp-4", "fsdp-over-tp"]
TENSORS = {
    "matrix": torch.arange(6.0).view(2, 3),
    "parameter": torch.nn.Parameter(torch.randn(3, 5, dtype=torch.bfloat16)),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "permuted": torch.arange(24).view(2, 3, 4).permute(2, 0, 1),
    "part of another": torch.randn(100)[10:20],
    "repeated": torch.ones(1).expand(6),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False]),
    "eight bits": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
    "unsigned": torch.tensor([1, 65535], dtype=torch.uint16),
}


def save(folder, **more):
    rest = {
        "optimizer": {"state.matrix.exp_avg": torch.ones(2, 3)},
        "train_state": {"step": 3},
        "lr_scheduler": {"a": 1},
    }
    dcp.save({**TENSORS, **rest, **more}, checkpoint_id=str(folder), no_dist=True)
    return folder


def content(stored):
    return stored.read().view(-1).view(torch.uint8).numpy().tobytes()


def test_tensors_of_any_strides_are_read_as_torch_saved_them(tmp_path):
    stored = read_tensors(save(tmp_path / "step-3"))
    assert stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        flat = tensor.detach().contiguous().view(-1)
        assert content(stored[name]) == flat.view(torch.uint8).numpy().tobytes(), name
        assert (stored[name].dtype, stored[name].shape) == (str(tensor.dtype)[6:], tuple(tensor.shape))


def test_a_folder_without_metadata_or_model_is_rejected(tmp_path):
    with pytest.raises(UserError, match=r"no \.metadata, must be a complete DCP checkpoint"):
        read_tensors(tmp_path)
    dcp.save({"train_state": {"step": 1}}, checkpoint_id=str(tmp_path / "step-1"), no_dist=True)
    with pytest.raises(UserError, match="found no model"):
        read_tensors(tmp_path / "step-1")


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_is_rejected_and_runs_none(tmp_path):
    checkpoint = save(tmp_path / "step-3")
    metadata = FileSystemReader(str(checkpoint)).read_metadata()
    metadata.planner_data = Bomb(tmp_path / "ran")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"mkdir does not belong .*must be the metadata of a DCP checkpoint"):
        read_tensors(checkpoint)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"a": 1}), pickle.dumps(np.float64(1))])
def test_metadata_of_something_else_is_rejected(content, tmp_path):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="must be the metadata of a DCP checkpoint"):
        read_tensors(tmp_path)


def test_a_changed_byte_of_a_tensor_is_found(tmp_path):
    checkpoint = save(tmp_path / "step-3", large=torch.full((64,), 1.5))
    (file,) = checkpoint.glob("*.distcp")
    whole = file.read_bytes()
    place = whole.index(torch.full((64,), 1.5).numpy().tobytes())
    file.write_bytes(whole[: place + 9] + b"\x7f" + whole[place + 10 :])
    stored = read_tensors(checkpoint)
    with pytest.raises(CorruptedError, match=r"found a wrong checksum .* where large should be"):
        content(stored["large"])
    assert content(stored["matrix"]) == TENSORS["matrix"].numpy().tobytes()


@pytest.mark.parametrize("name", sorted(TENSORS.keys() - {"empty"}))
def test_a_changed_byte_is_found_in_tensors_of_any_strides(name, tmp_path):
    checkpoint = save(tmp_path / "step-3")
    tensor = read_tensors(checkpoint)[name]
    (chunk,) = tensor.chunks
    data = bytearray(chunk.file.read_bytes())
    with zipfile.ZipFile(io.BytesIO(data[chunk.start : chunk.start + chunk.length])) as archive:
        memory = next(member for member in archive.infolist() if member.filename.endswith("/data/0"))
        content_of = archive.read(memory)
    data[data.index(content_of, chunk.start + memory.header_offset)] ^= 1
    chunk.file.write_bytes(data)
    with pytest.raises(CorruptedError, match=r"found a wrong checksum of .*/data/0"):
        tensor.read()


@pytest.mark.parametrize("kept", [0, 100, 1500])
def test_a_file_that_was_cut_short_or_is_gone_is_found(kept, tmp_path):
    checkpoint = save(tmp_path / "step-3")
    (file,) = checkpoint.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:kept])
    stored = read_tensors(checkpoint)
    with pytest.raises(CorruptedError, match=r"__0_0\.distcp: found no file of torch\.save .* where matrix should be"):
        content(stored["matrix"])
    file.unlink()
    with pytest.raises(CorruptedError, match=r"__0_0\.distcp: found no file where matrix should be"):
        content(stored["matrix"])


@pytest.mark.parametrize("place", ["/proc/self/mem", "/proc"])  # an input/output error where it is read; no file
def test_a_file_that_cannot_be_read_is_not_called_corrupted(place, tmp_path):
    stored = read_tensors(save(tmp_path / "step-3"))
    (tmp_path / "step-3" / "__0_0.distcp").unlink()
    (tmp_path / "step-3" / "__0_0.distcp").symlink_to(place)
    with pytest.raises(UserError, match=r"__0_0\.distcp: cannot be read \(.*\) and may be intact"):
        content(stored["matrix"])


def test_metadata_that_cannot_be_read_is_not_called_corrupted(tmp_path):
    save(tmp_path / "step-3")
    (tmp_path / "step-3" / ".metadata").unlink()
    (tmp_path / "step-3" / ".metadata").symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"\.metadata: cannot be read \(Input/output error\)"):
        read_tensors(tmp_path / "step-3")


def test_a_tensor_with_a_chunk_missing_is_found(tmp_path):
    checkpoint = save(tmp_path / "step-3")
    metadata = FileSystemReader(str(checkpoint)).read_metadata()
    metadata.state_dict_metadata["matrix"].size = torch.Size([4, 3])
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CorruptedError, match="matrix: the chunks hold 6 of its 12 elements"):
        content(read_tensors(checkpoint)["matrix"])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    script = Path(__file__).with_name("sharded.py")
    done = subprocess.run([sys.executable, str(script), str(folder)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_tensors_are_read_whole_from_every_layout(checkpoints):
    for layouts, wanted in ((PLAIN, tensors()), (MODULES, network().state_dict())):
        for layout in layouts:
            found = {name: stored.read() for name, stored in read_tensors(checkpoints / layout).items()}
            assert found.keys() == wanted.keys(), layout
            assert all(torch.equal(found[name], wanted[name]) for name in wanted), layout


@pytest.mark.parametrize("box", [((1, 3), (2, 3), (0, 4)), ((0, 1), (0, 0), (0, 4))])
def test_a_box_of_a_tensor_is_read_from_every_layout(checkpoints, box):
    wanted = tensors()["cube"][tuple(slice(*each) for each in box)]
    for layout in PLAIN:
        assert torch.equal(read_tensors(checkpoints / layout)["cube"].read(box), wanted), layout


@pytest.mark.parametrize("layouts", [PLAIN, MODULES])
def test_checkpoints_of_one_two_and_four_ranks_convert_to_the_same_bytes(checkpoints, layouts, tmp_path):
    digests = []
    for layout in layouts:
        (tmp_path / layout).mkdir()
        digests.append(convert_dcp_to_hf(read_tensors(checkpoints / layout), tmp_path / layout, "bfloat16"))
    assert all(digest == digests[0] for digest in digests)
