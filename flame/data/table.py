"""Opens what a source names: files, folders and hub ids, of which one column is text or token ids.

In this order: Megatron's .bin and .idx (flame.data.megatron); local JSON lines (flame.data.jsonl) and .txt files
(flame.data.files), as `datasets` fails a file whole where a part of it is broken; all else by `datasets`. Of it only
two things are used, random access to rows and a stream's position; shuffling is the windows' work.
"""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from flame.config.paths import COMPRESSED, KINDS, is_local
from flame.config.schema import DataSource
from flame.data.document import Bad, Document, accept
from flame.data.files import TextFiles, open_decompressed
from flame.data.jsonl import CHUNK, JsonLines, describe_columns, parse_line
from flame.data.megatron import IndexedRows, find_prefixes
from flame.data.retry import RetryingStream
from flame.data.window import Rows, Stream
from flame.errors import UserError

SAVED = ("state.json", "dataset_dict.json")  # in a folder that save_to_disk wrote
METADATA = ("dataset_infos.json", "dataset_info.json")  # files of a dataset that hold no rows
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
    """A column of an iterable dataset; a mark is the number of rows read and the dataset's own state after them."""

    def __init__(self, dataset: Any, column: str) -> None:
        self._dataset, self._column = dataset.select_columns([column]).with_format("arrow"), column

    def batches(self, size: int, mark: list | None = None) -> Iterator[tuple[list[Document | Bad], list]]:
        # A copy, as a dataset that loaded a state starts every later epoch from it. The cache of file systems is
        # shared by all datasets of the process, and other threads may be adding to it: it is not copied.
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
    """Text, token ids or None of each row; bytes where they are not UTF-8."""
    import pyarrow

    if not pyarrow.types.is_string(column.type) and not pyarrow.types.is_large_string(column.type):
        return [row.values.to_numpy(zero_copy_only=False) if row.is_valid else None for row in column]
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_try_to_decode(row) for row in column.cast(pyarrow.large_binary()).to_pylist()]


def _try_to_decode(row: bytes | None) -> str | bytes | None:
    try:
        return row.decode() if row is not None else None
    except UnicodeDecodeError:
        return row


def open_table(source: DataSource, streaming: bool) -> Rows | Stream:
    """The text column of what a source names, with random access or, streaming, in one order.

    Raises UserError, whose setting is a field of the source, if nothing is found there, or no such split or column.
    """
    path, files = source.path, source.data_files
    options = {
        "name": source.subset,
        "data_dir": source.data_dir,
        "data_files": [file.strip() for file in files.split(",")] if files else None,
    }
    try:
        if not files and len(kinds := _kinds(Path(path).expanduser())) > 1:  # one kind would be read, the others not
            found = f"files of several kinds ({', '.join(sorted(kinds))}) in {path}"
            raise UserError("path", found, "of one kind", "choose with --training.data_files")
        if prefixes := find_prefixes(path):
            return IndexedRows(prefixes)
        local = _find_files(source, options)
        if local and all(map(_is_lines, local)):
            types = describe_columns(local)
            return JsonLines(local, _choose(source, types) if types else source.column or COLUMNS[0])
        if local and all(_kind(Path(file)) == "text" for file in local):
            return TextFiles(local)
        dataset = _load(source, options, streaming)
        streamed = not hasattr(dataset, "__len__")
        names = dataset.column_names or list(next(iter(dataset), {}))
    except UserError:
        raise
    except _load_errors() as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError("path", path, hint=f"not loadable: {reason}") from error
    if not names or (not streamed and len(dataset) == 0):
        raise UserError("split", f"no rows in {source.split} of {path}")
    features = dataset.features or {}
    column = _choose(source, {name: _type(features.get(name)) for name in names})
    return RetryingStream(TableStream(dataset, column), path) if streamed else TableRows(dataset, column)


def _load_errors() -> tuple[type[Exception], ...]:
    """What a path or hub id that cannot be read raises; `datasets` takes its time to import."""
    from datasets.exceptions import DatasetsError

    return (OSError, ValueError, RuntimeError, ImportError, DatasetsError)


def _choose(source: DataSource, types: Mapping[str, str]) -> str:
    """The column to read of those there are, with their types."""
    asked = [source.column] if source.column else COLUMNS
    column = next((name for name in asked if name in types), None)
    if column is None:
        found = f"no column {' or '.join(map(repr, asked))} in {source.path}"
        raise UserError("column", found, f"one of {', '.join(types)}")
    if types[column] not in ("string", "large_string", "str", "list", "NoneType"):
        found = f"{types[column]} in column {column!r} of {source.path}"
        raise UserError("column", found, "a column of text or token ids")
    return column


def _type(feature: Any) -> str:
    """A feature's type: "list" if it is one of integers."""
    inner = getattr(feature, "feature", None)
    if inner is not None:
        kind = getattr(inner, "dtype", "")
        return "list" if "int" in kind else f"lists of {kind or 'lists'}"
    return getattr(feature, "dtype", "string")


def _find_files(source: DataSource, options: Mapping[str, Any]) -> list[str]:
    """The local files of a source's split; none if it names anything else, or only a slice of a split."""
    local = Path(source.path).expanduser()
    if local.is_dir() and _kinds(local) in ({"json"}, {"text"}):
        found = _list_files(str(local), **options)
    elif source.path in ("json", "text") and source.data_files:
        found = _list_files(source.path, **{**options, "name": None})
    else:
        found = {"train": _match(source.path)}
    chosen = [str(file) for file in found.get(source.split, [])]
    return chosen if all(os.path.isfile(file) for file in chosen) else []


def _list_files(path: str, **options: Any) -> Mapping[str | None, Sequence]:
    """The files of each split, as `load_dataset` finds them."""
    from datasets import load_dataset_builder

    return load_dataset_builder(path, **options).config.data_files or {}


def _is_lines(file: str) -> bool:
    """Whether a file holds an object per line: a .jsonl file does, and a .json file whose first line is one."""
    ending = _ending(Path(file))
    if ending != ".json":
        return ending == ".jsonl"
    with open_decompressed(Path(file)) as stream:
        return isinstance(parse_line(stream.readline(CHUNK), file), dict)


def _load(source: DataSource, options: Mapping[str, Any], streaming: bool) -> Any:
    """A `datasets` dataset, map-style or iterable; one saved by save_to_disk is always map-style."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    path, split, local = source.path, source.split, Path(source.path).expanduser()
    if local.is_dir() and any((local / mark).exists() for mark in SAVED):
        saved = load_from_disk(str(local))
        if isinstance(saved, DatasetDict) and split not in saved:
            raise UserError("split", split, f"one of {', '.join(saved)}, the splits of {path}")
        return saved[split] if isinstance(saved, DatasetDict) else saved
    as_text = path == "text"
    if local.is_dir():
        kinds = _kinds(local)
        if not kinds:
            raise UserError("path", f"no files to read in folder {path}", f"a folder with {', '.join(KINDS)} files")
        path, as_text = str(local), kinds == {"text"}
    elif found := _match(path):
        kind = _kind(Path(found[0]))
        if kind is None or any(_kind(Path(file)) != kind for file in found):
            raise UserError("path", path, f"files with one and the same ending, of {', '.join(KINDS)}")
        path, as_text, options = kind, kind == "text", {"data_files": {"train": found}}
    elif is_local(path):
        raise UserError("path", f"no file or folder {path}")
    by_document = {"sample_by": "document"} if as_text else {}
    return load_dataset(path, split=split, streaming=streaming, **options, **by_document)


def _match(path: str) -> list[str]:
    """The files of a path or pattern."""
    local = Path(path).expanduser()
    return [str(local)] if local.is_file() else sorted(glob(str(local), recursive=True))


def _kinds(folder: Path) -> set[str]:
    """The kinds of files of rows under a folder; none if it is not a folder, or one that save_to_disk wrote."""
    if not folder.is_dir() or any((folder / mark).exists() for mark in SAVED):
        return set()
    kinds = (_kind(file) for file in folder.rglob("*") if file.name not in METADATA)
    return {kind for kind in kinds if kind is not None}


def _kind(file: Path) -> str | None:
    return KINDS.get(_ending(file))


def _ending(file: Path) -> str:
    """A file's last suffix that is not a compressed file's."""
    return next((suffix for suffix in reversed(file.suffixes) if suffix not in COMPRESSED), "")
