"""Tiny models of each family, as the Hugging Face configs a user would write."""

import json
from pathlib import Path
from typing import Any

from flame.drills.job import MODEL

_FLA = {"fuse_cross_entropy": True, "fuse_norm": True, "fuse_swiglu": True, "hidden_size": 64, "vocab_size": 320}
_POSITIONS = {"max_position_embeddings": 256}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": MODEL | _POSITIONS | {"num_key_value_heads": 2},
    "gpt_neox": MODEL | _POSITIONS | {"model_type": "gpt_neox"},
    "transformer": {"model_type": "transformer", "num_hidden_layers": 2, "num_heads": 4, **_FLA},
    "gla": {"model_type": "gla", "num_hidden_layers": 2, "num_heads": 4, **_FLA},
}


def write_config(folder: Path, name: str, stem: str | None = None, **changes: Any) -> Path:
    """Write CONFIGS[name] with `changes` to folder/stem.json (stem: name); returns the path."""
    path = folder / f"{stem or name}.json"
    path.write_text(json.dumps(CONFIGS[name] | changes))
    return path
