"""Sources: named sets of rows and their weights in the mixture, opened from files, folders, the hub or "stdlib".

Local files (flame.data.listing) are read by a reader for each kind: JSON (flame.data.lines), text (flame.data.files),
Megatron's .bin and .idx (flame.data.megatron), and tables by `datasets` (flame.data.table), as the hub's data are.
"""

import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from importlib import import_module
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import Any

from flame.config.hub import check_available
from flame.config.schema import Data, DataSource, Training, Validation
from flame.data.cache import decompress
from flame.data.document import IDS, NOTHING, TEXT, Bad, Document, describe
from flame.data.files import LibraryFiles, TextFiles
from flame.data.lines import JsonLines, describe_columns
from flame.data.listing import check_fields, is_saved, list_files
from flame.data.megatron import IndexedRows
from flame.data.settings import parse_sources, spelled_by_the_user
from flame.data.table import (
    RetryingStream,
    TableRows,
    TableStream,
    describe_fields,
    open_column,
    quiet_datasets,
    read_schema,
    stream_column,
)
from flame.data.window import Rows, Stream
from flame.errors import UserError

COLUMNS = ("text", "content", "input_ids")
LOAD_ERRORS = (OSError, ValueError, RuntimeError, ImportError)  # and one of `datasets`, which takes its time to import
SAVED_ERRORS = (*LOAD_ERRORS, KeyError, TypeError, AttributeError)  # of load_from_disk, whose JSON files are damaged
SAMPLE = 16  # rows of a source by which it is known
BLOCK = 1024  # rows read at once to look for a document
NAMED_FILES = 5  # files that are not read and are named


@dataclass(frozen=True)
class Source:
    """A named set of rows and its weight in the mixture, in tokens.

    about: what was opened, for the log. left_out: files beside those that are read.
    """

    name: str
    weight: float
    rows: Any  # Rows or Stream
    about: str = ""
    left_out: Sequence[str] = ()

    @property
    def streamed(self) -> bool:
        """Whether the rows come in one order only."""
        return isinstance(self.rows, Stream)

    @cached_property
    def head(self) -> Sequence[Document | Bad]:
        """A few rows, as of `sample`, read once."""
        return self.sample(SAMPLE)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What tells this data from other data: the digest of a few rows and, unless streamed, the number of all."""
        digest = blake2b(digest_size=8)
        for row in self.head:
            content = b"" if isinstance(row, Bad) else row.encode() if isinstance(row, str) else row.tobytes()
            digest.update(len(content).to_bytes(8, "little") + content)
        if self.streamed:
            return {"first rows": digest.hexdigest()}
        return {"rows": len(self.rows), "some of the rows": digest.hexdigest()}

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

    def describe(self) -> Iterator[str]:
        """Lines for the log: what is read, and which files are not."""
        size = "streamed" if self.streamed else f"{len(self.rows):,} rows"
        yield f"source {self.name}: {size}{self.about and ', '}{self.about}"
        if self.left_out:
            more = f" and {len(self.left_out) - NAMED_FILES:,} more" if len(self.left_out) > NAMED_FILES else ""
            yield f"source {self.name}: not read: {', '.join(self.left_out[:NAMED_FILES])}{more}"


class Joined:
    """Rows of several readers one after the other; parts: each reader and which of its rows."""

    def __init__(self, parts: Sequence[tuple[Rows, range]]) -> None:
        self._parts = parts
        self._firsts = list(accumulate((len(chosen) for _, chosen in parts), initial=0))

    def __len__(self) -> int:
        return self._firsts[-1]

    def texts(self, indices: Sequence[int]) -> list[Document | Bad]:
        found: dict[int, Document | Bad] = {}
        for part, group in groupby(sorted(set(indices)), lambda i: bisect_right(self._firsts, i) - 1):
            (rows, chosen), wanted = self._parts[part], list(group)
            found |= zip(wanted, rows.texts([chosen[i - self._firsts[part]] for i in wanted]), strict=True)
        return [found[index] for index in indices]


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
            opened = _open(source, streaming)
            if not opened.streamed and len(opened.rows) == 0:
                raise UserError("path", f"no rows in {source.path}")
            _check_documents(opened, source.path)
        sources.append(opened)
    return sources


def _check_documents(opened: Source, path: str) -> None:
    """Raise UserError if no row holds a document; of a stream, none of the first."""
    if not all(isinstance(row, Bad) for row in opened.head):
        return
    blocks = islice(opened.blocks(BLOCK), 1 if opened.streamed else None)
    if all(isinstance(row, Bad) for rows in blocks for row in rows):
        where = f"the first {BLOCK} rows of " if opened.streamed else ""
        hint = "; ".join(f"{row.place}: {row.reason}" for row in opened.head[:1] if isinstance(row, Bad))
        raise UserError("path", f"no document in {where}{path}", hint=hint)


def _open(source: DataSource, streaming: bool) -> Source:
    """Open a source, with random access or, streaming, in one order.

    Raises UserError, whose setting is a field of the source, if nothing is found there, or no such split or column.
    """
    name = str(source.name)
    check_fields(source)
    if source.path == "stdlib":
        return Source(name, source.weight, LibraryFiles(), "Python's own source code")
    try:
        rows, about, left_out = _read_here(source, streaming) or _read_hub(source, streaming)
    except UserError:
        raise
    except (*LOAD_ERRORS, import_module("datasets.exceptions").DatasetsError) as error:
        cause: BaseException = error
        while cause.__cause__:  # `datasets` says but "an error occurred"
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise UserError("path", source.path, hint=f"not loadable: {reason}") from error
    return Source(name, source.weight, rows, about, left_out)


Opened = tuple[Any, str, Sequence[str]]  # Rows or Stream, and a source's `about` and `left_out`


def _read_here(source: DataSource, streaming: bool) -> Opened | None:
    """The rows of data on this machine; None if the source names others. Slices of splits are not streamed."""
    names = re.findall(r"(?:^|\+)\s*([\w.-]+)", source.split or "")
    sliced = source.split not in (None, *names)
    opened: dict[str | None, Opened] = {}
    for split in dict.fromkeys(names or [None]):
        if (found := _read_split(source, split, streaming and not sliced)) is None:
            return None
        opened[split] = found
    if not sliced:
        return opened[source.split]
    from datasets import ReadInstruction

    lengths = {split: len(rows) for split, (rows, _, _) in opened.items()}
    try:
        spans = ReadInstruction.from_spec(source.split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        allowed = "splits and slices of whole numbers or percents, such as train[:98%]+test[10:20]"
        raise UserError("split", repr(source.split), allowed) from error
    parts = [(opened[span.splitname][0], range(span.from_, span.to)) for span in spans]
    about = "; ".join(about for _, about, _ in opened.values())
    left_out = dict.fromkeys(file for _, _, files in opened.values() for file in files)
    return Joined(parts), f"{source.split} of {about}", list(left_out)


def _read_split(source: DataSource, split: str | None, streaming: bool) -> Opened | None:
    """One split of data on this machine; None if the source names others. Only .parquet files alone are streamed."""
    if is_saved(Path(source.path).expanduser()):
        return _read_saved(source, split or "train")
    if (listing := list_files(source, split)) is None:
        return None
    streaming = streaming and len(listing.files) == 1
    read = [_read_kind(source, kind, files, streaming) for kind, files in listing.files.items()]
    return _join([rows for rows, _ in read]), "; ".join(about for _, about in read), listing.left_out


def _read_saved(source: DataSource, split: str) -> Opened:
    """A folder that save_to_disk wrote."""
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(Path(source.path).expanduser()))
    except IndexError as error:  # it has no files of rows
        raise UserError("path", f"no rows in {source.path}") from error
    except SAVED_ERRORS as error:
        hint = f"damaged, {type(error).__name__}: {error}"
        raise UserError("path", source.path, "a folder that save_to_disk wrote", hint) from error
    splits = saved if isinstance(saved, DatasetDict) else {split: saved}
    if split not in splits:
        raise UserError("split", split, f"one of {', '.join(splits)}, the splits of {source.path}")
    column = _find_column(source, [describe_fields(splits[split].features.arrow_schema)])
    left_out = [f"split {other}" for other in splits if other != split]
    return TableRows(splits[split], column), f"split {split} as save_to_disk wrote it, column {column}", left_out


def _read_kind(source: DataSource, kind: str, files: Sequence[str], streaming: bool) -> tuple[Any, str]:
    """The rows of local files of one kind, and what the log says of them."""
    size = sum(os.path.getsize(file) for file in files)
    amount = f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size:,} bytes"
    about = f"{len(files):,} {kind} file{'s' if len(files) > 1 else ''}, {amount}"
    if kind == "megatron":
        return IndexedRows([file.removesuffix(".idx") for file in files]), about
    if kind == "text":
        return TextFiles(files), about
    if kind == "json":
        column = _find_column(source, map(describe_columns, files))
        return JsonLines(files, column), f"{about}, column {column}"
    files = [decompress(file) for file in files]
    fields = {file: describe_fields(read_schema(kind, file)) for file in files}
    column = _find_column(source, fields.values())
    for file, types in fields.items():
        _find_column(replace(source, path=file, column=column), [types])
    about = f"{about}, column {column}"
    if streaming and kind == "parquet" and (stream := stream_column(files, column)):
        return RetryingStream(stream, source.path, waits=()), about
    return _join([open_column(kind, file, column) for file in files]), about


def _join(parts: Sequence[Rows]) -> Rows:
    return parts[0] if len(parts) == 1 else Joined([(rows, range(len(rows))) for rows in parts])


def _read_hub(source: DataSource, streaming: bool) -> Opened:
    """The rows of a hub dataset, or of files elsewhere."""
    from datasets import load_dataset

    quiet_datasets()
    path, split = source.path, source.split or "train"
    check_available("path", path, "dataset")
    files = [file.strip() for file in source.data_files.split(",")] if source.data_files else None
    options = {"name": source.subset, "data_dir": source.data_dir, "data_files": files}
    if path == "text":
        options["sample_by"] = "document"
    dataset = load_dataset(path, split=split, streaming=streaming, **options)
    if dataset.features:
        types = describe_fields(dataset.features.arrow_schema)
    else:
        types = {name: describe(value) for name, value in next(iter(dataset), {}).items()}
    if not types or (not streaming and len(dataset) == 0):
        raise UserError("split", f"no rows in {split} of {path}")
    column = _find_column(source, [types])
    about = f"split {split} of {path}, column {column}"
    if streaming:
        return RetryingStream(TableStream(dataset, column), path), about, ()
    return TableRows(dataset, column), about, ()


def _find_column(source: DataSource, files: Iterable[Mapping[str, str]]) -> str:
    """The column to read, which the first file that has one decides; files: what the columns of each hold.

    Raises UserError if none has it, unless nothing is known of any.
    """
    asked = (source.column,) if source.column else COLUMNS
    known: dict[str, str] = {}
    for types in files:
        if column := next((name for name in asked if types.get(name) in (TEXT, IDS, NOTHING)), None):
            return column
        known |= types
    if not known:
        return asked[0]
    readable = [name for name, holds in known.items() if holds in (TEXT, IDS)]
    allowed = f"one of {', '.join(readable)}" if readable else "a column of text or token ids"
    hint = "" if readable else f"there are {', '.join(f'{name} ({holds})' for name, holds in known.items())}"
    if column := next((name for name in asked if name in known), None):
        raise UserError("column", f"{known[column]} in column {column!r} of {source.path}", allowed, hint)
    raise UserError("column", f"no column {' or '.join(map(repr, asked))} in {source.path}", allowed, hint)
