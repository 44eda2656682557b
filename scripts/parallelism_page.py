"""Writes the table of what each family allows into docs/parallelism.md: python scripts/parallelism_page.py"""

from pathlib import Path

from flame.models.family import Family, layouts
from flame.models.table import BY_MODEL_TYPE

PAGE = Path(__file__).parents[1] / "docs" / "parallelism.md"
MARKS = ("<!-- families -->\n", "<!-- /families -->\n")  # the table lies between them
COLUMNS = ("FSDP2", "HSDP", "DDP", "TP", "CP", "PP")


def row(model_type: str, family: Family) -> str:
    """A line of the table: what a model type allows, and why it does not allow the rest."""
    allowed = layouts(family)
    cells = ["yes" if column in allowed else "no" for column in COLUMNS]
    cells += ["one graph" if family.fullgraph else "graph breaks", "no" if family.packing is None else "yes"]
    reasons = [f"TP, CP: {family.cut}"] if isinstance(family.cut, str) else []
    reasons += [f"PP: {family.stages}"] if isinstance(family.stages, str) else []
    return f"| `{model_type}` | {' | '.join(cells)} | {'; '.join(reasons)} |"


def table() -> str:
    """The whole table."""
    header = ("model type", *COLUMNS, "compile", "varlen", "because")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *(row(*item) for item in sorted(BY_MODEL_TYPE.items()))]) + "\n"


def page(text: str) -> str:
    """The page with the table of today in it."""
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
