"""Tables of `datasets`: files, folders and hub ids, of which one column is text or token ids; and what else a path is.

Of `datasets` only two things are used, random access to rows and a stream's position; shuffling is the windows' work.
Local files of which a part can be broken are read here, as `datasets` fails a file whole: JSON lines by
flame.data.jsonl, .txt files, each one document, by flame.data.textfile; and Megatron's .bin and .idx by
flame.data.megatron.
"""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from flame.config.paths import is_local
from flame.data.document import Bad, Document, accept
from flame.data.jsonl import CHUNK, JsonLines, describe_columns, parse_line
from flame.data.megatron import IndexedRows, find_prefixes
from flame.data.packed import PACKED, open_packed
from flame.data.retry import PatientStream
from flame.data.textfile import TextFiles
from flame.errors import UserError

FLAG = "--training.dataset"
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow", ".txt": "text"}
SAVED = ("state.json", "dataset_dict.json")  # in a folder that save_to_disk wrote
ABOUT = ("dataset_infos.json", "dataset_info.json")  # files of a dataset that hold no rows
COLUMNS = ("text", "content", "input_ids")


class TableRows:
    """A column of a map-style dataset, by index through Arrow."""

    def __init__(self, dataset: Any, column: str) -> None:
        self._dataset, self._column = dataset.select_columns([column]).with_format("arrow"), column

    def __len__(self) -> int:
        return len(self._dataset)

    def texts(self, indices: Sequence[int]) -> list[Document | Bad]:
        values = _values(self._dataset[list(indices)].column(self._column))
        return [accept(value, f"row {i}") for value, i in zip(values, indices, strict=True)]


class TableStream:
    """A column of an iterable dataset; a mark is the number of rows read and the dataset's own state behind them."""

    def __init__(self, dataset: Any, column: str) -> None:
        self._dataset, self._column = dataset.select_columns([column]).with_format("arrow"), column

    def batches(self, size: int, mark: list | None = None) -> Iterator[tuple[list[Document | Bad], list]]:
        # A copy, as a dataset that loaded a state starts every later epoch from it; but for the file systems that all
        # datasets of the process hold on to, and that other threads may be adding to.
        from huggingface_hub import HfFileSystem

        shared = HfFileSystem._cache
        dataset = copy.deepcopy(self._dataset, {id(shared): shared})
        row, state = mark or (0, None)
        if state is not None:
            dataset.load_state_dict(state)
        for batch in dataset.iter(size):
            values = _values(batch.column(self._column))
            documents = [accept(value, f"row {i}") for i, value in enumerate(values, row)]
            row += len(values)
            yield documents, [row, dataset.state_dict()]


def _values(column: Any) -> list[Any]:
    """Text, token ids or None of each row; bytes where they are no UTF-8."""
    import pyarrow

    if not pyarrow.types.is_string(column.type) and not pyarrow.types.is_large_string(column.type):
        return [row.values.to_numpy(zero_copy_only=False) if row.is_valid else None for row in column]
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decoded(row) for row in column.cast(pyarrow.large_binary()).to_pylist()]


def _decoded(row: bytes | None) -> str | bytes | None:
    try:
        return row.decode() if row is not None else None
    except UnicodeDecodeError:
        return row


def open_table(
    path: str, name: str | None, split: str, folder: str | None, files: str | None, streaming: bool, column: str | None
) -> IndexedRows | JsonLines | TextFiles | TableRows | PatientStream:
    """The text column of what a path or hub id names, with random access or, streaming, in one order.

    folder, files: data_dir and data_files of `load_dataset`, files a comma list; column: None for "text", "content" or
    "input_ids". Raises UserError, one line, if nothing is found there, it has no rows or no such column.
    """
    try:
        inner = [file.strip() for file in files.split(",")] if files else None
        if not inner and len(kinds := _kinds(Path(path).expanduser())) > 1:  # one kind would be read, the others not
            there = ", ".join(sorted(kinds))
            raise UserError(f"{FLAG} {path}: files of several kinds ({there}); choose with --training.data_files")
        if prefixes := find_prefixes(path):
            return IndexedRows(prefixes)
        local = _find_files(path, name, split, folder, inner)
        if local and all(map(_is_lines, local)):
            types = describe_columns(local)
            return JsonLines(local, _choose(path, types, column)) if types else JsonLines(local, column or COLUMNS[0])
        if local and all(_kind(Path(file)) == "text" for file in local):
            return TextFiles(local)
        dataset = _load(path, name, split, folder, inner, streaming)
        streamed = not hasattr(dataset, "__len__")
        names = dataset.column_names or list(next(iter(dataset), {}))
    except UserError:
        raise
    except _failures() as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{FLAG} {path}: not loadable ({reason})") from error
    if not names or (not streamed and len(dataset) == 0):
        raise UserError(f"{FLAG} {path}: split {split} has no rows")
    features = dataset.features or {}
    found = _choose(path, {column: _type(features.get(column)) for column in names}, column)
    return PatientStream(TableStream(dataset, found), path) if streamed else TableRows(dataset, found)


def _failures() -> tuple[type[Exception], ...]:
    """What a path or hub id that cannot be read raises; `datasets` is imported by what needs it, and only then."""
    from datasets.exceptions import DatasetsError

    return (OSError, ValueError, RuntimeError, ImportError, DatasetsError)


def _choose(path: str, types: Mapping[str, str], column: str | None) -> str:
    """The column to read of those there are, with their types."""
    found = next((c for c in ([column] if column else COLUMNS) if c in types), None)
    if found is None:
        asked = f"column {column!r} (--data.column)" if column else "column 'text', 'content' or 'input_ids'"
        raise UserError(f"{FLAG} {path}: no {asked}; choose with --data.column from {', '.join(types)}")
    if types[found] not in ("string", "large_string", "str", "list", "NoneType"):
        kind = types[found]
        raise UserError(f"{FLAG} {path}: column {found!r} holds {kind}, not text; choose another with --data.column")
    return found


def _type(feature: Any) -> str:
    """A feature's type: "list" if it is one of integers."""
    inner = getattr(feature, "feature", None)
    if inner is not None:
        kind = getattr(inner, "dtype", "")
        return "list" if "int" in kind else f"lists of {kind or 'lists'}"
    return getattr(feature, "dtype", "string")


def _find_files(path: str, name: str | None, split: str, folder: str | None, files: list[str] | None) -> list[str]:
    """The files that a name stands for here; none if it is anything else, or only a slice of a split."""
    local = Path(path).expanduser()
    if local.is_dir() and _kinds(local) in ({"json"}, {"text"}):
        found = _list_files(str(local), name, folder, files)
    elif path in ("json", "text") and files:
        found = _list_files(path, None, folder, files)
    else:
        found = {"train": [str(local)] if local.is_file() else sorted(glob(str(local), recursive=True))}
    chosen = [str(file) for file in found.get(split, [])]
    return chosen if all(os.path.isfile(file) for file in chosen) else []


def _list_files(path: str, name: str | None, folder: str | None, files: list[str] | None) -> Mapping[str, Sequence]:
    """The files of each split, as `load_dataset` finds them."""
    from datasets import load_dataset_builder

    return load_dataset_builder(path, name, data_dir=folder, data_files=files).config.data_files or {}


def _is_lines(file: str) -> bool:
    """Whether a file holds an object a line: a .jsonl file does, and a .json file whose first line is one."""
    ending = next((suffix for suffix in reversed(Path(file).suffixes) if suffix not in PACKED), None)
    if ending != ".json":
        return ending == ".jsonl"
    with open_packed(Path(file)) as stream:
        return isinstance(parse_line(stream.readline(CHUNK)), dict)


def _load(path: str, name: str | None, split: str, folder: str | None, files: list[str] | None, streaming: bool) -> Any:
    """A `datasets` dataset, map-style or iterable; one saved by save_to_disk is always map-style."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    local = Path(path).expanduser()
    if local.is_dir() and any((local / mark).exists() for mark in SAVED):
        saved = load_from_disk(str(local))
        if not isinstance(saved, DatasetDict):
            return saved
        if split not in saved:
            raise UserError(f"--training.dataset_split {split}: {path} has the splits {', '.join(saved)}")
        return saved[split]
    if local.is_dir():
        kinds = _kinds(local)
        if not kinds:
            raise UserError(f"{FLAG} {path}: no files to read in this folder; allowed: {', '.join(KINDS)}")
        options = {"sample_by": "document"} if kinds == {"text"} else {}
        return load_dataset(
            str(local), name, split=split, data_dir=folder, data_files=files, streaming=streaming, **options
        )
    pattern = bool(set(path) & set("*?["))
    found = [str(local)] if local.is_file() else sorted(glob(str(local), recursive=True)) if pattern else []
    if found:
        endings = {_kind(Path(file)) for file in found}
        kind = endings.pop()
        if endings or kind is None:
            raise UserError(f"{FLAG} {path}: files with one and the same ending are needed, of {', '.join(KINDS)}")
        options = {"sample_by": "document"} if kind == "text" else {}
        return load_dataset(kind, data_files={"train": found}, split=split, streaming=streaming, **options)
    if is_local(path):
        raise UserError(f"{FLAG} {path}: no such file or folder")
    options = {"sample_by": "document"} if path == "text" else {}
    return load_dataset(path, name, split=split, data_dir=folder, data_files=files, streaming=streaming, **options)


def _kinds(folder: Path) -> set[str]:
    """The kinds of files of rows under a folder; none if it is no folder, or one that save_to_disk wrote."""
    if not folder.is_dir() or any((folder / mark).exists() for mark in SAVED):
        return set()
    kinds = (_kind(file) for file in folder.rglob("*") if file.name not in ABOUT)
    return {kind for kind in kinds if kind is not None}


def _kind(file: Path) -> str | None:
    suffixes = [suffix for suffix in file.suffixes if suffix not in PACKED]
    return KINDS.get(suffixes[-1]) if suffixes else None
