"""Tiny models as a run leaves them, a checkpoint and what was recorded beside it; and as they are published."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM

from flame.checkpoint.structure import Structure
from flame.convert.hf_structure import model_structure
from flame.data.tokenize import build_tokenizer
from flame.models.causal_lm import CausalLM, ModelArgs
from flame.models.hf import build_on_meta, load_hf_config, save_assets
from tests.layouts import MODELS

_FAST = (
    *("llama", "mistral", "qwen3", "gpt_neox", "falcon", "falcon_groups"),
    *("transformer", "gla", "gated_deltanet", "rwkv7", "mamba2"),
)
_FAST_TIED = ("llama", "gpt_neox", "gla")
CASES = [
    pytest.param(name, tied, marks=() if name in (_FAST_TIED if tied else _FAST) else pytest.mark.slow)
    for name in sorted(MODELS)
    for tied in (False, True)
]


MODEL = {
    "model.embed.weight": torch.randn(8, 4),
    "model.norm.weight": torch.ones(4),
    "model.n": torch.tensor([3]),
    "model.flag": torch.tensor(True),
    "model.none": torch.empty(0, 3),
}


def build(folder: Path, name: str, **changes: Any) -> tuple[CausalLM, Any]:
    """A tiny model of MODELS[name] with `changes`, and the byte-level tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(MODELS[name] | changes))
    tokenizer = build_tokenizer("byte")
    family, config = load_hf_config(str(folder / f"{name}.json"), tokenizer=tokenizer)
    with torch.device("meta"):
        model = CausalLM(ModelArgs(seed=1).bind(family, config))
    model.to_empty(device="cpu")
    model.init_weights()
    return model.eval(), tokenizer


def save_run(folder: Path, name: str, step: int = 1, **changes: Any) -> CausalLM:
    """A run folder of that model: checkpoint/step-N as torchtitan lays it out, and model/."""
    model, tokenizer = build(folder, name, **changes)
    optimizer = {f"state.{key}.exp_avg": torch.ones_like(p) for key, p in model.named_parameters()}
    state = {**model.state_dict(), "optimizer": optimizer, "train_state": {"step": step}}
    dcp.save(state, checkpoint_id=str(folder / "checkpoint" / f"step-{step}"), no_dist=True)
    save_assets(folder / "model", model.hf, tokenizer.hf)
    return model


def publish(folder: Path, name: str, shard: str = "50GB", **changes: Any) -> Any:
    """A tiny model of MODELS[name] as transformers builds it, after it saved it to a folder with its tokenizer.

    Its weights are further apart than initial ones are, so that another model has another loss.
    """
    model, tokenizer = build(folder.parent, name, **changes)
    published = AutoModelForCausalLM.from_config(model.hf.config).eval()
    with torch.no_grad():
        for parameter in published.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    published.save_pretrained(folder, max_shard_size=shard)  # under the names of the hub, not always the modules'
    tokenizer.hf.save_pretrained(folder)
    return published


def structure_of(folder: Path, **changes: Any) -> Structure:
    """The tensors of the model of a folder's config.json, or of a JSON, with `changes`."""
    _, config = load_hf_config(str(folder))
    for name, value in changes.items():
        setattr(config, name, value)
    return model_structure(build_on_meta(config, str(folder)))
