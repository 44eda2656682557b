import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM, AutoTokenizer

from flame.checkpoint.export import export_checkpoint, record_assets
from flame.data.tokenize import build_tokenizer
from flame.models.causal_lm import CausalLM, ModelArgs, load_hf_config
from tests.tiny import CONFIGS, write_config


def save(folder, name, **changes):
    """A model, its checkpoint and what a run records of it."""
    tokenizer = build_tokenizer("byte")
    family, config = load_hf_config(str(write_config(folder, name, **changes)), tokenizer=tokenizer)
    with torch.device("meta"):
        model = CausalLM(ModelArgs(seed=1).bind(family, config))
    model.to_empty(device="cpu")
    model.init_weights()
    dcp.save({**model.state_dict(), "train_state": {"step": 1}}, checkpoint_id=str(folder / "step-1"), no_dist=True)
    record_assets(folder / "model", model.hf, tokenizer.hf)
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_exported_model_gives_the_logits_of_the_training_models_own_forward(name, tied, tmp_path):
    model = save(tmp_path, name, tie_word_embeddings=tied)
    assert export_checkpoint(tmp_path / "step-1", tmp_path / "model", tmp_path / "hf")
    loaded, problems = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not problems["missing_keys"] and not problems["unexpected_keys"]
    tokens = torch.randint(0, 257, (2, 96))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens, use_cache=False).logits, model(tokens))


def test_an_export_has_the_tokenizer_and_its_end_of_text(tmp_path):
    save(tmp_path, "llama")
    export_checkpoint(tmp_path / "step-1", tmp_path / "model", tmp_path / "hf", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    assert tokenizer("naïve 🔥").input_ids == list("naïve 🔥".encode())
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 256


def test_an_export_of_steps_that_were_done_again_is_made_again_and_the_old_one_kept(tmp_path):
    save(tmp_path, "llama")
    export_checkpoint(tmp_path / "step-1", tmp_path / "model", tmp_path / "hf")
    old = (tmp_path / "hf" / "model.safetensors").read_bytes()
    save(tmp_path, "llama", initializer_range=0.5)
    assert export_checkpoint(tmp_path / "step-1", tmp_path / "model", tmp_path / "hf")
    assert (tmp_path / "hf.old-1" / "model.safetensors").read_bytes() == old
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() != old


def test_an_export_that_was_cut_short_is_done_again_and_a_whole_one_is_left_alone(tmp_path):
    save(tmp_path, "llama")
    (tmp_path / ".hf.tmp").mkdir()
    (tmp_path / ".hf.tmp" / "model.safetensors").write_bytes(b"torn")
    assert export_checkpoint(tmp_path / "step-1", tmp_path / "model", tmp_path / "hf")
    written = (tmp_path / "hf" / "model.safetensors").stat().st_mtime_ns
    assert not export_checkpoint(tmp_path / "step-1", tmp_path / "model", tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").stat().st_mtime_ns == written
    assert not (tmp_path / ".hf.tmp").exists()
