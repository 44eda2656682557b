"""Tables of `datasets`: files, folders and hub ids, of which one column is text.

Of `datasets` only two things are used, random access to rows and a stream's position; shuffling is the windows' work.
A .txt file is one document. Compressed files (.gz, .zst, ...) are read as `datasets` reads them.
"""

import copy
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from flame.errors import UserError

FLAG = "--training.dataset"
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow", ".txt": "text"}
PACKED = (".gz", ".zst", ".bz2", ".xz")
COLUMNS = ("text", "content")


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


def open_table(
    path: str, name: str | None, split: str, folder: str | None, files: str | None, streaming: bool, column: str | None
) -> TableRows | TableStream:
    """The text column of what a path or hub id names, with random access or, streaming, in one order.

    folder, files: data_dir and data_files of `load_dataset`, files a comma list; column: None for "text" or "content".
    Raises UserError, one line, if nothing is found there, it has no rows or no such column of text.
    """
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
