"""`flame.sh models list`: model configs with their sizes, counted on the meta device."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from flame.models.causal_lm import CausalLM, ModelArgs
from flame.models.family import layouts
from flame.models.hf import build_on_meta, read_config, read_fields, warn_of_unknown

CONFIGS = Path(__file__).parents[2] / "configs"
_HEADER = ("model", "type", "parameters", "no embeddings", "GFLOPs/token", "layouts", "compile", "varlen")


class Size(NamedTuple):
    """A model on the meta device, with its parameters (inner: without embedding and head) and FLOPs per token."""

    model: CausalLM
    parameters: int
    inner: int
    flops: int


def measure(path: Path, seq_len: int = 2048) -> Size:
    """The size of a config file's model; training FLOPs at rows of `seq_len`. Raises UserError if it is invalid."""
    fields = read_fields(str(path))
    family, config = read_config(fields, str(path))
    warn_of_unknown(fields, config, str(path))
    build_on_meta(config, str(path))
    args = ModelArgs().bind(family, config)
    with torch.device("meta"):
        model = CausalLM(args)
    parameters, flops = args.get_nparams_and_flops(model, seq_len)
    return Size(model, parameters, parameters - model.embedding.weight.numel() * (1 if model.tied else 2), flops)


def table(paths: Iterable[Path], seq_len: int) -> str:
    """A line per config: aligned columns, numbers to the right."""
    rows = [_HEADER]
    for path in paths:
        model, parameters, inner, flops = measure(path, seq_len)
        family, config = model.family, model.hf.config
        numbers = f"{parameters:,}", f"{inner:,}", f"{flops / 1e9:,.2f}"
        compiled, varlen = "fullgraph" if family.fullgraph else "breaks", "no" if family.packing is None else "yes"
        rows.append((path.stem, config.model_type, *numbers, " ".join(layouts(family)), compiled, varlen))
    return "\n".join(align(rows, range(2, 5)))


def align(rows: Sequence[Sequence[str]], right: range) -> list[str]:
    """Rows as lines of aligned columns, those in `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = (
        (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return ["  ".join(row).rstrip() for row in cells]
