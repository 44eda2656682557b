"""Writes a small model with its first weights, a Hugging Face folder: python -m scripts.gpu_check.models NAME FOLDER"""

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "debug": ROOT / "configs/gla_debug.json",
    "llama_1B": ROOT / "scripts/rehearsal/llama3.2_1B.json",
    "gla_340M": ROOT / "configs/gla_340M.json",
    "transformer_340M": ROOT / "configs/transformer_340M.json",
}
DEPTH, WIDTH = 2, 256


def small(source: str | Path) -> tuple[Any, Any]:
    """Family and config of a model, shrunk to two blocks of 256 unless it is as small."""
    from flame.models.hf import read_config, read_fields
    from flame.models.shrink import shrink

    fields = read_fields(str(source))
    family, config = read_config(fields, str(source))
    if config.hidden_size > WIDTH:
        family, config = read_config(shrink(config.to_dict(), config, DEPTH, WIDTH), str(source))
    return family, config


def main(name: str, folder: Path) -> None:
    from flame.runtime import device

    device.choose()
    import torch

    from flame.models import reference
    from flame.models.hf import build_hf

    reference.enable()
    torch.manual_seed(0)
    model = build_hf(small(CONFIGS[name])[1])
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(partial)
    partial.rename(folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
