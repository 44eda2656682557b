"""`python -m flame.models list`: the model configs there are, counted on the meta device."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from flame.models.causal_lm import CausalLM, ModelArgs
from flame.models.family import layouts
from flame.models.hf import read_config, read_fields

CONFIGS = Path(__file__).parents[2] / "configs"
COLUMNS = ("model", "type", "parameters", "no embeddings", "GFLOPs/token", "layouts", "compile", "varlen")


def count(path: Path, seq_len: int = 2048) -> tuple[str, int, int, int, CausalLM]:
    """Of a config file: model type, parameters, those that are no embedding or head, training FLOPs a token, model."""
    family, config = read_config(read_fields(str(path)), str(path))
    args = ModelArgs().bind(family, config)
    with torch.device("meta"):
        model = CausalLM(args)
    parameters, flops = args.get_nparams_and_flops(model, seq_len)
    tables = model.embedding.weight.numel() * (1 if model.tied else 2)
    return config.model_type, parameters, parameters - tables, flops, model


def rows(paths: Iterable[Path], seq_len: int) -> Iterator[tuple[str, ...]]:
    """The cells of each config's line, as COLUMNS names them."""
    for path in paths:
        model_type, parameters, inner, flops, model = count(path, seq_len)
        family = model.family
        yield (
            path.stem,
            model_type,
            f"{parameters:,}",
            f"{inner:,}",
            f"{flops / 1e9:,.2f}",
            " ".join(layouts(family)),
            "fullgraph" if family.fullgraph else "breaks",
            "no" if family.packing is None else "yes",
        )


def table(paths: Iterable[Path], seq_len: int) -> str:
    """Aligned columns; numbers to the right."""
    cells = [COLUMNS, *rows(paths, seq_len)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = range(2, 5)
    lines = (
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)
