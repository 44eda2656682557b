"""A folder that `AutoModelForCausalLM.from_pretrained` loads, made from a checkpoint and what the run recorded."""

import json
import os
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from flame.checkpoint.convert import convert_dcp_to_hf

ORIGIN = "flame_export.json"  # in an export: which checkpoint it was made from


def record_assets(folder: Path, hf_model: Any, hf_tokenizer: Any) -> None:
    """Write config.json, generation_config.json and the tokenizer: all that an export needs besides the weights."""
    config = hf_model.config
    config.architectures = [type(hf_model).__name__]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    hf_tokenizer.save_pretrained(folder)


def export_checkpoint(checkpoint: Path, assets: Path, folder: Path, dtype: torch.dtype | None = None) -> bool:
    """Export a DCP checkpoint to `folder`, whole or not at all; returns False if this very one is there already.

    `assets` is the folder that `record_assets` wrote. The weights are cast to `dtype` when given. An export of another
    checkpoint of the same name (its steps were done again) is moved aside.
    """
    origin = {"metadata_mtime_ns": (checkpoint / ".metadata").stat().st_mtime_ns, "dtype": str(dtype)}
    if folder.exists():
        if _origin(folder) == origin:
            return False
        aside = (folder.with_name(f"{folder.name}.old-{n}") for n in count(1))
        os.replace(folder, next(path for path in aside if not path.exists()))
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # what an export that was killed left behind
    shutil.copytree(assets, temporary)
    convert_dcp_to_hf(checkpoint, temporary, dtype)
    (temporary / ORIGIN).write_text(json.dumps(origin))
    os.replace(temporary, folder)
    return True


def _origin(folder: Path) -> dict[str, Any] | None:
    path = folder / ORIGIN
    return json.loads(path.read_text()) if path.exists() else None
