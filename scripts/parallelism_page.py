"""Writes the tables of what each model supports into docs/parallelism.md: python scripts/parallelism_page.py"""

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's flame

from flame.models.family import Family, layouts
from flame.models.table import BY_MODEL_TYPE
from flame.preflight.inputs import TITAN
from flame.titan.parallelize import has_experts, has_right_masks
from scripts.tables import fill

PAGE = Path(__file__).parents[1] / "docs" / "parallelism.md"
COLUMNS = ("FSDP2", "HSDP", "DDP", "TP", "CP", "PP")


def row(model_type: str, family: Family) -> str:
    """A row of the table: what a model type supports, and why it does not support the rest."""
    allowed = layouts(family)
    cells = ["yes" if column in allowed else "no" for column in COLUMNS]
    cells += ["one graph" if family.fullgraph else "graph breaks"]
    cells[-1] += ", by default" if family.compiles else ""
    cells += ["no" if family.packing is None else "yes"]
    cells += ["not in PP" if "PP" in allowed else "yes"]
    cells += ["no" if family.float8 is not True else "not gathered" if family.from_fla else "yes"]
    reasons = [f"TP, CP: {family.tp_plan}"] if isinstance(family.tp_plan, str) else []
    reasons += [f"PP: {family.stages}"] if isinstance(family.stages, str) else []
    reasons += [f"float8: {family.float8}"] if isinstance(family.float8, str) else []
    return f"| `{model_type}` | {' | '.join(cells)} | {'; '.join(reasons)} |"


def table() -> str:
    """The table of model types."""
    header = ("model type", *COLUMNS, "compile", "varlen", "tied", "float8", "reason")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *(row(*item) for item in sorted(BY_MODEL_TYPE.items()))]) + "\n"


def titan_row(name: str, spec: Any) -> str:
    """A row of torchtitan's table, for one of its TrainSpecs."""
    flavors = spec.model_args
    mixtures = [flavor for flavor, args in flavors.items() if has_experts(args)]
    masked = [flavor for flavor, args in flavors.items() if has_right_masks(args)]
    cells = ["yes", "yes", "yes", "yes", "no", "yes" if spec.pipelining_fn else "no"]
    experts = "no" if not mixtures else "yes" if len(mixtures) == len(flavors) else _list(mixtures)
    cells += [experts, _list(masked) or "no"]
    return f"| `{name}` | {' | '.join(cells)} |"


def titan_table() -> str:
    """The table of torchtitan's own models."""
    header = ("--model.name", *COLUMNS, "EP", "varlen")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    rows = (titan_row(name, import_module(f"torchtitan.models.{name}").get_train_spec()) for name in TITAN)
    return "\n".join([*lines, *rows]) + "\n"


def _list(flavors: list[str]) -> str:
    return " ".join(f"`{flavor}`" for flavor in flavors)


def page(text: str) -> str:
    """The page with its tables up to date."""
    return fill(text, {"families": table(), "torchtitan": titan_table()})


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
