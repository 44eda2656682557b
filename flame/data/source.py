"""Sources: named sets of rows, from the standard library's own code, local files and folders, or the hub.

Of `datasets` only two things are used, random access to rows and a stream's position; shuffling is the windows' work.
A .txt file is one document. Compressed files (.gz, .zst, ...) are read as `datasets` reads them.
"""

import copy
import math
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from flame.errors import UserError

FLAG = "--training.dataset"
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow", ".txt": "text"}
PACKED = (".gz", ".zst", ".bz2", ".xz")
COLUMNS = ("text", "content")


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

    def sample(self, count: int) -> list[str | None]:
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
        self._files = [root / path for path in sorted(p for p in found if not apart & set(p.parts))]

    def __len__(self) -> int:
        return len(self._files)

    def texts(self, indices: Sequence[int]) -> list[str | None]:
        return [self._files[i].read_text(encoding="utf-8", errors="replace") for i in indices]


class TableRows:
    """A column of a map-style dataset, by index through Arrow."""

    def __init__(self, dataset: Any, column: str) -> None:
        self._dataset, self._column = dataset.select_columns([column]).with_format("arrow"), column

    def __len__(self) -> int:
        return len(self._dataset)

    def texts(self, indices: Sequence[int]) -> list[str | None]:
        return self._dataset[list(indices)].column(self._column).to_pylist()


class TableStream:
    """A column of an iterable dataset; a mark is the dataset's own state, taken between two batches."""

    def __init__(self, dataset: Any, column: str) -> None:
        self._dataset, self._column = dataset.select_columns([column]).with_format("arrow"), column

    def batches(self, size: int, mark: dict | None = None) -> Iterator[tuple[list[str | None], dict]]:
        # A copy, as a dataset that loaded a state starts every later epoch from it; but for the file systems that all
        # datasets of the process hold on to, and that other threads may be adding to.
        from huggingface_hub import HfFileSystem

        shared = HfFileSystem._cache
        dataset = copy.deepcopy(self._dataset, {id(shared): shared})
        if mark is not None:
            dataset.load_state_dict(mark)
        for batch in dataset.iter(size):
            yield batch.column(self._column).to_pylist(), dataset.state_dict()


def build_sources(training: Any, data: Any) -> list[Source]:
    """The sources a job names.

    training: dataset, dataset_name, dataset_split, data_dir, data_files, data_probs (comma lists, aligned) and
    streaming; data: column. Raises UserError for lists of unequal length, weights that are not positive numbers, and
    data that is not found, has no rows or no text column.
    """
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
    sources: list[Source] = []
    columns = [aligned(flag) for flag in ("dataset_name", "dataset_split", "data_dir", "data_files")]
    for path, weight, name, split, folder, files in zip(paths, weights, *columns, strict=True):
        rows = _open_rows(path, name, split or "train", folder, files, training.streaming, data.column)
        sources.append(Source(_name(path, name, [s.name for s in sources]), weight, rows))
    return sources


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
    while Path(base).suffix in (*KINDS, *PACKED):
        base = Path(base).stem
    base = f"{base}-{name}" if name else base
    return next(n for n in (base, *(f"{base}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def _open_rows(
    path: str, name: str | None, split: str, folder: str | None, files: str | None, streaming: bool, column: str | None
) -> Any:
    if path == "stdlib":
        return LibraryRows()
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        inner = [file.strip() for file in files.split(",")] if files else None
        dataset = _load(path, name, split, folder, inner, streaming)
        streamed = isinstance(dataset, datasets.IterableDataset)
        names = dataset.column_names or list(next(iter(dataset), {}))
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{FLAG} {path}: not loadable ({reason})") from error
    if not names or (not streamed and len(dataset) == 0):
        raise UserError(f"{FLAG} {path}: split {split} has no rows")
    found = next((c for c in ([column] if column else COLUMNS) if c in names), None)
    if found is None:
        asked = f"column {column!r} (--data.column)" if column else "column 'text' or 'content'"
        raise UserError(f"{FLAG} {path}: no {asked}; choose with --data.column from {', '.join(names)}")
    kind = getattr((dataset.features or {}).get(found), "dtype", "string")
    if kind not in ("string", "large_string"):
        raise UserError(f"{FLAG} {path}: column {found!r} holds {kind}, not text; choose another with --data.column")
    return TableStream(dataset, found) if streamed else TableRows(dataset, found)


def _load(path: str, name: str | None, split: str, folder: str | None, files: list[str] | None, streaming: bool) -> Any:
    """A `datasets` dataset, map-style or iterable; one saved by save_to_disk is always map-style."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    local = Path(path).expanduser()
    if local.is_dir() and any((local / mark).exists() for mark in ("state.json", "dataset_dict.json")):
        saved = load_from_disk(str(local))
        if not isinstance(saved, DatasetDict):
            return saved
        if split not in saved:
            raise UserError(f"--training.dataset_split {split}: {path} has the splits {', '.join(saved)}")
        return saved[split]
    if local.is_dir():
        kinds = {_kind(file) for file in local.rglob("*")} - {None}
        if not kinds:
            raise UserError(f"{FLAG} {path}: no files to read in this folder; allowed: {', '.join(KINDS)}")
        options = {"sample_by": "document"} if kinds == {"text"} else {}
        return load_dataset(
            str(local), name, split=split, data_dir=folder, data_files=files, streaming=streaming, **options
        )
    pattern = bool(set(path) & set("*?["))
    found = [str(local)] if local.is_file() else sorted(glob(str(local), recursive=True)) if pattern else []
    if found:
        kinds = {_kind(Path(file)) for file in found}
        if len(kinds) > 1 or None in kinds:
            raise UserError(f"{FLAG} {path}: files of one kind are needed; allowed: {', '.join(KINDS)}")
        kind = kinds.pop()
        options = {"sample_by": "document"} if kind == "text" else {}
        return load_dataset(kind, data_files={"train": found}, split=split, streaming=streaming, **options)
    if pattern or path[0] in "./~" or path.count("/") > 1 or _kind(local):
        raise UserError(f"{FLAG} {path}: no such file or folder")
    options = {"sample_by": "document"} if path == "text" else {}
    return load_dataset(path, name, split=split, data_dir=folder, data_files=files, streaming=streaming, **options)


def _kind(file: Path) -> str | None:
    suffixes = [suffix for suffix in file.suffixes if suffix not in PACKED]
    return KINDS.get(suffixes[-1]) if suffixes else None
