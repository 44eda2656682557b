import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from flame.checkpoint.convert import convert_dcp_to_hf


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint as torchtitan lays it out: the model at the top level, the rest under prefixes."""
    model = {"model.embed.weight": torch.randn(8, 4), "model.norm.weight": torch.ones(4), "model.n": torch.tensor([3])}
    rest = {"optimizer": {"state.model.embed.weight.exp_avg": torch.ones(8, 4)}, "train_state": {"step": 3}}
    dcp.save({**model, **rest}, checkpoint_id=str(tmp_path / "step-3"), no_dist=True)
    return tmp_path / "step-3", model


def test_the_models_tensors_alone_are_written_bit_for_bit(checkpoint, tmp_path):
    path, model = checkpoint
    out = tmp_path / "hf"
    out.mkdir()
    assert sorted(convert_dcp_to_hf(path, out)) == sorted(model)
    written = load_file(out / "model.safetensors")
    assert written.keys() == model.keys()
    assert all(torch.equal(written[name], model[name]) for name in model)


def test_shards_have_an_index_and_a_cast_leaves_integers_alone(checkpoint, tmp_path):
    path, model = checkpoint
    out = tmp_path / "hf"
    out.mkdir()
    convert_dcp_to_hf(path, out, torch.bfloat16, shard_bytes=64)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    written = {k: v for file in set(index["weight_map"].values()) for k, v in load_file(out / file).items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in written.values())
    assert written["model.n"].dtype == torch.int64
    assert torch.equal(written["model.embed.weight"], model["model.embed.weight"].bfloat16())


def test_a_checkpoint_without_a_model_is_an_error(tmp_path):
    dcp.save({"train_state": {"step": 1}}, checkpoint_id=str(tmp_path / "step-1"), no_dist=True)
    with pytest.raises(ValueError, match="holds no model"):
        convert_dcp_to_hf(tmp_path / "step-1", tmp_path)
