"""Tiny models as a run leaves them: a checkpoint, and what was recorded beside it."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from flame.checkpoint.export import record_assets
from flame.data.tokenize import build_tokenizer
from flame.models.causal_lm import CausalLM, ModelArgs
from flame.models.hf import load_hf_config
from tests.tiny import write_config


def build(folder: Path, name: str, **changes: Any) -> tuple[CausalLM, Any]:
    """A tiny model of CONFIGS[name] with `changes`, and the byte-level tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer("byte")
    family, config = load_hf_config(str(write_config(folder, name, **changes)), tokenizer=tokenizer)
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
    record_assets(folder / "model", model.hf, tokenizer.hf)
    return model
