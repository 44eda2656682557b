"""Checkpoints of several ranks: what is read of them is what was saved, whatever the layout."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flame.convert.conversion import convert_dcp_to_hf
from flame.convert.dcp_file import read_blocks, read_tensors
from tests.convert.sharded import network, tensors
from tests.launch import environment

PLAIN = [f"shard{dim}-{ranks}" for dim in (0, 1) for ranks in (1, 2, 4)] + ["both", "tp-replicated", "twice", "async"]
MODULES = ["fsdp-1", "fsdp-2", "fsdp-4", "fsdp-over-tp"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    script = Path(__file__).with_name("sharded.py")
    done = subprocess.run([sys.executable, str(script), str(folder)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def read(checkpoint, block_bytes):
    """{name: tensor} as flame.checkpoint reads them; blocks must come in order and be no larger than was asked."""
    found = {}
    for name, stored in read_tensors(checkpoint).items():
        blocks = list(read_blocks(name, stored, None, block_bytes))
        assert all(block.nbytes <= max(block_bytes, 4) for block in blocks)
        flat = np.concatenate([block.reshape(-1) for block in blocks])
        found[name] = torch.from_numpy(flat.view(stored.dtype)).view(stored.shape)
    return found


@pytest.mark.parametrize("block_bytes", [1, 24, 100, 1 << 20])
def test_tensors_are_read_whole_from_every_layout(checkpoints, block_bytes):
    for layouts, wanted in ((PLAIN, tensors()), (MODULES, network().state_dict())):
        for layout in layouts:
            found = read(checkpoints / layout, block_bytes)
            assert found.keys() == wanted.keys(), layout
            assert all(torch.equal(found[name], wanted[name]) for name in wanted), layout


@pytest.mark.parametrize("block_bytes", [8, 1 << 20])
def test_a_box_of_a_tensor_is_read_from_every_layout(checkpoints, block_bytes):
    box = ((1, 3), (2, 3), (0, 4))
    wanted = tensors()["cube"][1:3, 2:3, 0:4].numpy().tobytes()
    for layout in PLAIN:
        stored = read_tensors(checkpoints / layout)["cube"]
        found = b"".join(block.tobytes() for block in read_blocks("cube", stored, box, block_bytes))
        assert found == wanted, layout


@pytest.mark.parametrize("layouts", [PLAIN, MODULES])
def test_checkpoints_of_one_two_and_four_ranks_convert_to_the_same_bytes(checkpoints, layouts, tmp_path):
    digests = []
    for layout in layouts:
        (tmp_path / layout).mkdir()
        digests.append(convert_dcp_to_hf(read_tensors(checkpoints / layout), tmp_path / layout, "bfloat16"))
    assert all(digest == digests[0] for digest in digests)
