"""Sources: named sets of rows and their weights in the mixture, opened from files, folders, the hub or "stdlib".

What a path names is looked for in this order: Megatron's .bin and .idx (flame.data.megatron); local JSON lines and
.txt files (flame.data.files), as `datasets` fails a file whole where a part of it is broken; and all else by `datasets`
(flame.data.table).
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from importlib import import_module
from pathlib import Path
from typing import Any

from flame.config.hub import check_source
from flame.config.paths import KINDS, ending
from flame.config.schema import Data, DataSource, Training, Validation
from flame.data.document import Bad, Document
from flame.data.files import JsonLines, LibraryFiles, TextFiles, describe_columns, is_json_lines
from flame.data.megatron import IndexedRows, find_prefixes
from flame.data.settings import parse_sources, spelled_by_the_user
from flame.data.table import RetryingStream, TableRows, TableStream
from flame.data.window import Rows, Stream
from flame.errors import UserError

METADATA = ("dataset_infos.json", "dataset_info.json")  # files of a dataset that hold no rows
COLUMNS = ("text", "content", "input_ids")
LOAD_ERRORS = (OSError, ValueError, RuntimeError, ImportError)  # and one of `datasets`, which takes its time to import


@dataclass(frozen=True)
class Source:
    """A named set of rows and its weight in the mixture, in tokens."""

    name: str
    weight: float
    rows: Any  # Rows or Stream

    @property
    def streamed(self) -> bool:
        """Whether the rows come in one order only."""
        return isinstance(self.rows, Stream)

    def sample(self, count: int) -> Sequence[Document | Bad]:
        """Up to so many rows: spread over the source, or a stream's first."""
        if self.streamed:
            return next(self.rows.batches(count), ([], None))[0]
        step = max(1, len(self.rows) // count)
        return self.rows.texts(list(range(0, len(self.rows), step))[:count])

    def blocks(self, size: int) -> Iterator[list[Document | Bad]]:
        """All rows in their own order, up to so many at a time."""
        if self.streamed:
            yield from (rows for rows, _ in self.rows.batches(size))
            return
        for first in range(0, len(self.rows), size):
            yield self.rows.texts(list(range(first, min(first + size, len(self.rows)))))


def build_sources(section: Training | Validation, data: Data, streaming: bool | None = None) -> list[Source]:
    """Open the sources of a section.

    streaming: read hub sources over the network; default training.streaming. Raises UserError for settings that are
    wrong, and for data that cannot be read.
    """
    sources: list[Source] = []
    if streaming is None:
        streaming = isinstance(section, Training) and section.streaming
    for index, source in enumerate(parse_sources(section, data)):
        with spelled_by_the_user(section, data, index):
            opened = Source(str(source.name), source.weight, _open(source, streaming))
            if not opened.streamed and len(opened.rows) == 0:
                raise UserError("path", f"no rows in {source.path}")
        sources.append(opened)
    return sources


def _open(source: DataSource, streaming: bool) -> Rows | Stream:
    """The rows of a source, with random access or, streaming, in one order.

    Raises UserError, whose setting is a field of the source, if nothing is found there, or no such split or column.
    """
    if source.path == "stdlib":
        return LibraryFiles()
    files = [file.strip() for file in source.data_files.split(",")] if source.data_files else None
    options = {"name": source.subset, "data_dir": source.data_dir, "data_files": files}
    try:
        kinds = _kinds(Path(source.path).expanduser())
        if not files and len(kinds) > 1:  # one kind would be read, the others not
            found = f"files of several kinds ({', '.join(sorted(kinds))}) in {source.path}"
            raise UserError("path", found, "of one kind", "choose with data_files")
        if prefixes := find_prefixes(source.path):
            return IndexedRows(prefixes)
        in_place = _find_files(source, kinds, options)
        if in_place and all(map(is_json_lines, in_place)):
            return JsonLines(in_place, _choose_column(source, describe_columns(in_place)))
        if in_place and all(_kind(file) == "text" for file in in_place):
            return TextFiles(in_place)
        dataset = _load(source, kinds, options, streaming)
        names = dataset.column_names or list(next(iter(dataset), {}))
    except UserError:
        raise
    except (*LOAD_ERRORS, import_module("datasets.exceptions").DatasetsError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError("path", source.path, hint=f"not loadable: {reason}") from error
    streamed = not hasattr(dataset, "__len__")
    if not names or (not streamed and len(dataset) == 0):
        raise UserError("split", f"no rows in {source.split} of {source.path}")
    features = dataset.features or {}
    column = _choose_column(source, {name: _type(features.get(name)) for name in names})
    return RetryingStream(TableStream(dataset, column), source.path) if streamed else TableRows(dataset, column)


def _choose_column(source: DataSource, types: Mapping[str, str]) -> str:
    """The column to read of those there are, with their types; none are known where no line can be read."""
    asked = (source.column,) if source.column else COLUMNS
    column = next((name for name in asked if name in types or not types), None)
    if column is None:
        found = f"no column {' or '.join(map(repr, asked))} in {source.path}"
        raise UserError("column", found, f"one of {', '.join(types)}")
    if types and types[column] not in ("string", "large_string", "str", "list", "NoneType"):
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


def _find_files(source: DataSource, kinds: Collection[str], options: Mapping[str, Any]) -> list[str]:
    """The local files of a source's split; none if it names anything else, or only a slice of a split."""
    if kinds in ({"json"}, {"text"}):
        found = _list_files(str(Path(source.path).expanduser()), **options)
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


def _match(path: str) -> list[str]:
    """The files of a path or pattern."""
    path = str(Path(path).expanduser())
    return [path] if os.path.isfile(path) else sorted(glob(path, recursive=True))


def _load(source: DataSource, kinds: Collection[str], options: Mapping[str, Any], streaming: bool) -> Any:
    """A `datasets` dataset, map-style or iterable; one saved by save_to_disk is always map-style."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    path, split, local = source.path, source.split, Path(source.path).expanduser()
    if _is_saved(local):
        saved = load_from_disk(str(local))
        if isinstance(saved, DatasetDict) and split not in saved:
            raise UserError("split", split, f"one of {', '.join(saved)}, the splits of {path}")
        return saved[split] if isinstance(saved, DatasetDict) else saved
    as_text = path == "text"
    if local.is_dir():
        if not kinds:
            raise UserError("path", f"no files to read in folder {path}", f"a folder with {', '.join(KINDS)} files")
        path, as_text = str(local), kinds == {"text"}
    elif found := _match(path):
        kind = _kind(found[0])
        if kind is None or any(_kind(file) != kind for file in found):
            raise UserError("path", path, f"files with one and the same ending, of {', '.join(KINDS)}")
        path, as_text, options = kind, kind == "text", {"data_files": {"train": found}}
    else:
        check_source("path", path, "dataset")
    by_document = {"sample_by": "document"} if as_text else {}
    return load_dataset(path, split=split, streaming=streaming, **options, **by_document)


def _is_saved(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))  # by save_to_disk


def _kinds(folder: Path) -> set[str]:
    """The kinds of files of rows under a folder; none if it is not a folder, or one that save_to_disk wrote."""
    if not folder.is_dir() or _is_saved(folder):
        return set()
    kinds = (_kind(str(file)) for file in folder.rglob("*") if file.name not in METADATA)
    return {kind for kind in kinds if kind is not None}


def _kind(file: str) -> str | None:
    return KINDS.get(ending(file))
