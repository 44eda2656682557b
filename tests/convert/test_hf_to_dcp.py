"""Hugging Face weights become a DCP checkpoint that torch loads, and that is read back."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from flame.checkpoint.structure import ConversionError
from flame.convert.hf_to_dcp import convert_hf_to_dcp
from flame.convert.hf_weights import read_weights
from tests.convert.models import MODEL


@pytest.mark.parametrize("piece_bytes", [1, 40, 1 << 20])
def test_torch_loads_the_checkpoint_for_pieces_of_any_size(piece_bytes, tmp_path):
    save_file(MODEL, tmp_path / "model.safetensors")
    weights = read_weights([tmp_path / "model.safetensors"])
    convert_hf_to_dcp(weights, tmp_path / "step-0", piece_bytes=piece_bytes)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in MODEL.items()}
    dcp.load(loaded, checkpoint_id=str(tmp_path / "step-0"), no_dist=True)
    assert all(torch.equal(loaded[name], MODEL[name]) for name in MODEL)
    dcp_to_torch_save(str(tmp_path / "step-0"), str(tmp_path / "all.pt"))
    assert torch.load(tmp_path / "all.pt").keys() == MODEL.keys()


def test_the_checkpoint_is_read_back(tmp_path):
    save_file(MODEL, tmp_path / "model.safetensors")
    weights = read_weights([tmp_path / "model.safetensors"])

    def spoil(count):  # the last call comes after every tensor was written
        calls.append(count)
        with open(tmp_path / "model.safetensors", "r+b") as file:
            file.seek(weights.entries["model.norm.weight"].start)
            file.write(bytes([len(calls)] * 4))

    calls = []
    with pytest.raises(ConversionError, match=r"model\.norm\.weight reads back as other bytes"):
        convert_hf_to_dcp(weights, tmp_path / "step-0", advance=spoil)
