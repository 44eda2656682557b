"""DCP loads Hugging Face weights into a model; they become a checkpoint that torch loads, and that is read back."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from flame.checkpoint.structure import ConversionError, Structure
from flame.convert.hf_to_dcp import WeightReader, convert_hf_to_dcp
from flame.convert.hf_weights import check_weights, read_weights
from flame.convert.safetensors_file import TensorEntry, find_files
from flame.errors import UserError
from tests.convert.models import CASES, MODEL, build, publish, structure_of

TOKENS = torch.arange(96).view(2, 48) * 7919 % 257


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
            file.seek(place)
            file.write(bytes([len(calls)] * 4))

    calls = []
    place = (tmp_path / "model.safetensors").read_bytes().index(MODEL["model.norm.weight"].numpy().tobytes())
    with pytest.raises(ConversionError, match=r"model\.norm\.weight reads back as other bytes"):
        convert_hf_to_dcp(weights, tmp_path / "step-0", advance=spoil)


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_weights_of_several_files_give_the_model_that_transformers_loads(name, tied, tmp_path):
    published = publish(tmp_path / "hf", name, shard="100KB", tie_word_embeddings=tied)
    assert len(find_files(tmp_path / "hf")) > 1
    model, _ = build(tmp_path, name, tie_word_embeddings=tied)
    reader = WeightReader(read_weights(find_files(tmp_path / "hf"), structure_of(tmp_path / "hf")))
    dcp.load(model.state_dict(), storage_reader=reader, no_dist=True)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), published(TOKENS, use_cache=False).logits)


@pytest.mark.parametrize(("name", "tables"), [("llama", 2), ("tied", 1), ("gpt_neox", 2)])
def test_rows_of_new_ids_are_the_mean_of_the_old_ones(name, tables, tmp_path):
    published = publish(tmp_path / "hf", name, vocab_size=257).state_dict()
    structure = structure_of(tmp_path / "hf", vocab_size=320)
    weights = read_weights(find_files(tmp_path / "hf"), structure)
    with pytest.raises(UserError, match=r"has \[257, 64\], the config says \[320, 64\].*--model.grow_vocab or"):
        check_weights(weights, tmp_path / "hf")
    grown, _ = build(tmp_path, name)
    check_weights(weights, tmp_path / "hf", grow=True)
    dcp.load(grown.state_dict(), storage_reader=WeightReader(weights), no_dist=True)
    larger = [key for key, tensor in grown.state_dict().items() if len(tensor) == 320]
    assert len(larger) == tables
    for key, tensor in grown.state_dict().items():
        before = published[key]
        assert torch.equal(tensor[: len(before)], before)
        if key in larger:
            assert torch.equal(tensor[257:], before.double().mean(0).float().expand(63, -1))


def test_large_tensors_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("flame.convert.hf_to_dcp.PIECE_BYTES", 4096)
    read, sizes = TensorEntry.read, []

    def watched(entry, box):
        sizes.append((piece := read(entry, box)).nbytes)
        return piece

    monkeypatch.setattr(TensorEntry, "read", watched)
    table = torch.randn(200, 50)
    save_file({"table": table}, tmp_path / "model.safetensors")
    loaded = {"table": torch.zeros(200, 50)}
    weights = read_weights(find_files(tmp_path), Structure({"table": ("float32", (200, 50))}))
    dcp.load(loaded, storage_reader=WeightReader(weights), no_dist=True)
    assert len(sizes) == 10 and max(sizes) <= 4096
    assert torch.equal(loaded["table"], table)
