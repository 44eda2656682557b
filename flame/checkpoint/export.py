"""A folder that `AutoModelForCausalLM.from_pretrained` loads, made from a checkpoint and what the run recorded."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from flame.checkpoint.convert import convert_dcp_to_hf


def record_assets(folder: Path, hf_model: Any, hf_tokenizer: Any) -> None:
    """Write config.json, generation_config.json and the tokenizer: all that an export needs besides the weights."""
    config = hf_model.config
    config.architectures = [type(hf_model).__name__]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    hf_tokenizer.save_pretrained(folder)


def export_checkpoint(checkpoint: Path, assets: Path, folder: Path, dtype: torch.dtype | None = None) -> bool:
    """Export a DCP checkpoint to `folder`, whole or not at all; returns False if it is there already.

    `assets` is the folder that `record_assets` wrote. The weights are cast to `dtype` when given.
    """
    if folder.exists():
        return False
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # what an export that was killed left behind
    shutil.copytree(assets, temporary)
    convert_dcp_to_hf(checkpoint, temporary, dtype)
    os.replace(temporary, folder)
    return True
