"""Sources: named sets of rows, from the standard library's own code, local files and folders, or the hub.

How files and hub datasets are opened is in flame.data.table.
"""

import math
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.config.schema import DataSource
from flame.data.document import Bad, Document
from flame.data.packed import PACKED
from flame.data.table import FLAG, KINDS, open_table
from flame.errors import UserError


@dataclass(frozen=True)
class Source:
    """A named set of rows and its weight in the mixture, in tokens."""

    name: str
    weight: float
    rows: Any  # flame.data.window's Rows or Stream

    @property
    def streamed(self) -> bool:
        """Whether the rows come in one order only."""
        return not hasattr(self.rows, "texts")

    def sample(self, count: int) -> list[Document | Bad]:
        """Up to so many rows: spread over the source, or a stream's first."""
        if self.streamed:
            return next(self.rows.batches(count), ([], None))[0]
        step = max(1, len(self.rows) // count)
        return self.rows.texts(list(range(0, len(self.rows), step))[:count])


class LibraryRows:
    """The Python standard library's own source, one row a file, read in place."""

    def __init__(self) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        apart = {"site-packages", "dist-packages", "__pycache__"}
        found = (path.relative_to(root) for path in root.rglob("*.py"))
        files = [root / path for path in sorted(p for p in found if not apart & set(p.parts))]
        self._files = [file for file in files if file.stat().st_size]

    def __len__(self) -> int:
        return len(self._files)

    def texts(self, indices: Sequence[int]) -> list[Document | Bad]:
        return [self._files[i].read_text(encoding="utf-8", errors="replace") for i in indices]


def build_sources(training: Any, data: Any) -> list[Source]:
    """The sources a job names.

    training: dataset, dataset_name, dataset_split, data_dir, data_files, data_probs (comma lists, aligned) and
    streaming; data: column, and sources, which are read instead if there are any. Raises UserError for lists of unequal
    length, weights that are not positive numbers, and data that is not found, has no rows or no column to read.
    """
    sources: list[Source] = []
    for table in data.sources or _tables(training):
        name = table.name or _name(table.path, table.subset, [s.name for s in sources])
        source = Source(name, table.weight, _open(table, training.streaming, data.column))
        if not source.streamed and len(source.rows) == 0:
            raise UserError(f"{FLAG} {table.path}: no rows")
        sources.append(source)
    return sources


def _open(table: DataSource, streaming: bool, column: str | None) -> Any:
    if table.path == "stdlib":
        return LibraryRows()
    return open_table(
        table.path,
        table.subset,
        table.split or "train",
        table.data_dir,
        table.data_files,
        streaming,
        table.column or column,
    )


def _tables(training: Any) -> list[DataSource]:
    """The sources of the comma lists as tables."""
    paths = [path.strip() for path in training.dataset.split(",")]
    if not all(paths):
        raise UserError(f"{FLAG} {training.dataset!r}: an empty item; allowed: stdlib, a local path or a hub id each")

    def aligned(flag: str) -> list[str | None]:
        value = getattr(training, flag)
        items: list[str | None] = [item.strip() or None for item in value.split(",")] if value else [None] * len(paths)
        if flag == "data_files" and len(paths) == 1:
            return [value or None]  # the files of the one source, however many
        if len(items) != len(paths):
            raise UserError(f"--training.{flag} {value!r}: {len(items)} items for {len(paths)} datasets; one each")
        return items

    weights = _weights(aligned("data_probs"))
    columns = [aligned(flag) for flag in ("dataset_name", "dataset_split", "data_dir", "data_files")]
    return [
        DataSource(path, weight=weight, subset=subset, split=split, data_dir=folder, data_files=files)
        for path, weight, subset, split, folder, files in zip(paths, weights, *columns, strict=True)
    ]


def _weights(items: Sequence[str | None]) -> list[float]:
    if not any(items):
        return [1.0] * len(items)
    try:
        weights = [float(item or "nan") for item in items]
    except ValueError:
        weights = [math.nan]
    if not all(0 < weight < math.inf for weight in weights):
        given = ",".join(item or "" for item in items)
        raise UserError(f"--training.data_probs {given}: a positive number for each dataset is needed")
    return weights


def _name(path: str, name: str | None, taken: Sequence[str]) -> str:
    """Last part of the path that says something, the dataset's own sub-name, and a number if that is taken."""
    parts = [part for part in Path(path).parts if not set(part) & set("*?[")] or ["data"]
    base = parts[-1]
    while Path(base).suffix in (*KINDS, *PACKED, ".bin", ".idx"):
        base = Path(base).stem
    base = f"{base}-{name}" if name else base
    return next(n for n in (base, *(f"{base}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)
