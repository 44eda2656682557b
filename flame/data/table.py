"""Rows of `datasets`: random access or a stream's position, and nothing else of it; shuffling is the windows' work."""

import asyncio
import copy
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from hashlib import blake2b
from typing import Any, BinaryIO

from flame.data import cache
from flame.data.document import IDS, NOTHING, TEXT, Bad, Document, accept
from flame.data.window import Stream
from flame.errors import UserError

WAITS = (1, 2, 4, 8, 16, 32, *[60] * 20)  # seconds; some 20 minutes, within --comm.train_timeout_seconds
COPIED = 1000  # rows of a .parquet file in one batch of its copy
PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


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
    """Text, token ids or None of each row; bytes if a text is not UTF-8."""
    import pyarrow

    if isinstance(column.type, pyarrow.JsonType):  # of values of several types, as `datasets` reads them
        return [text and json.loads(text) for text in column.cast(pyarrow.string()).to_pylist()]
    if describe_type(column.type) == IDS:
        return [row.values.to_numpy(zero_copy_only=False) if row.is_valid else None for row in column]
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast(pyarrow.large_binary()).to_pylist()


def describe_type(kind: Any) -> str:
    """What a column of an Arrow type holds, in the words of `flame.data.document.describe`."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(kind):
        return describe_type(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return TEXT
    if types.is_null(kind):
        return NOTHING
    if isinstance(kind, pyarrow.JsonType):  # told row by row
        return TEXT
    if types.is_struct(kind):
        return "structs"
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return IDS if types.is_integer(kind.value_type) else f"lists of {describe_type(kind.value_type)}"
    return str(kind)


def describe_fields(schema: Any) -> dict[str, str]:
    """{column: what it holds} of an Arrow schema."""
    return {field.name: describe_type(field.type) for field in schema}


def quiet_datasets() -> None:
    """No progress bars of `datasets` in a log, nor its own account of errors that are raised."""
    from datasets import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)


def read_schema(kind: str, file: str) -> Any:
    """The Arrow schema of a local .parquet or .arrow file. Raises UserError if the file is not of that kind."""
    with _open_table(kind, file) as table:
        return table.schema_arrow if kind == "parquet" else table.schema


@contextmanager
def _open_table(kind: str, file: str) -> Iterator[Any]:
    """A ParquetFile, or a reader of Arrow's stream or file format. Raises UserError, in the block too."""
    from pyarrow import ArrowException, ArrowInvalid, ipc
    from pyarrow.parquet import ParquetFile

    with open(file, "rb") as content:
        try:
            if kind == "parquet":
                yield ParquetFile(content)
                return
            try:
                table = ipc.open_stream(content)
            except ArrowInvalid:
                table = ipc.open_file(content)
            yield table
        except UserError:
            raise
        except (ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:  # the last two of lengths
            if getattr(error, "errno", None) is not None:  # of the disk
                raise
            raise UserError(file, hint=f"not a whole .{kind} file, {_one_line(error)}") from error


def open_column(kind: str, file: str, column: str) -> TableRows:
    """A column of a local .parquet or .arrow file, in a copy of it that is fast to access at random.

    Raises UserError if the file is damaged, and OSError.
    """
    from datasets import Dataset
    from pyarrow import RecordBatch, ipc, schema

    def write(out: BinaryIO) -> Iterator[int]:
        with _open_table(kind, file) as table:
            target = _text_type(_find_type(file, read_schema(kind, file), column))
            with ipc.new_stream(out, schema([(column, target)])) as writer:
                for batch in _batches(table, column):
                    array = batch.column(column).cast(target)
                    # Damaged offsets would have Arrow read elsewhere; text that is not UTF-8 is told row by row.
                    (array.cast("large_binary") if target == "large_string" else array).validate(full=True)
                    writer.write_batch(RecordBatch.from_arrays([array], [column]))
                    yield array.nbytes

    ending = f".{blake2b(column.encode(), digest_size=4).hexdigest()}.arrow"
    return TableRows(Dataset.from_file(cache.make(file, ending, "copying", write)), column)


def _find_type(file: str, schema: Any, column: str) -> Any:
    if (count := len(schema.get_all_field_indices(column))) > 1:
        raise UserError(file, f"{count} columns {column!r}", "one")
    return schema.field(column).type


def _batches(table: Any, column: str) -> Iterable[Any]:
    """The record batches of what `_open_table` gives, with a column at least."""
    if hasattr(table, "iter_batches"):
        return table.iter_batches(COPIED, columns=[column])
    return map(table.get_batch, range(table.num_record_batches)) if hasattr(table, "get_batch") else table


def _text_type(kind: Any) -> Any:
    """large_string for all types of text; any other type itself."""
    import pyarrow

    is_text = describe_type(kind) == TEXT and not isinstance(kind, pyarrow.JsonType)
    return pyarrow.large_string() if is_text else kind


def stream_column(files: Sequence[str], column: str) -> TableStream | None:
    """A column of local .parquet files as a stream; None if none has rows, or one holds text and another ids.

    Raises UserError.
    """
    import pyarrow
    from datasets import Features, load_dataset

    heads, types = {}, []  # rows in the first group of each file that has rows
    for file in files:
        with _open_table("parquet", file) as table:
            types.append(_find_type(file, table.schema_arrow, column))
            if table.metadata.num_rows:
                heads[file] = table.metadata.row_group(0).num_rows
    if not heads:
        return None
    try:
        merged = [pyarrow.schema([(column, kind)]) for kind in types]
        chosen = pyarrow.unify_schemas(merged, promote_options="permissive").field(column).type
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
        return None
    chosen = pyarrow.string() if describe_type(chosen) == TEXT and not pyarrow.types.is_large_string(chosen) else chosen
    quiet_datasets()
    dataset = load_dataset(
        "parquet",
        data_files={"train": [escape(os.path.abspath(file)) for file in heads]},
        split="train",
        streaming=True,
        columns=[column],  # alone, as the others may differ from file to file
        features=Features.from_arrow_schema(pyarrow.schema([(column, chosen)])),
        batch_size=None if all(heads.values()) else COPIED,  # None: as many as in the first group
    )
    return TableStream(dataset, column)


class RetryingStream:
    """A stream that outlives network failures: it is read on from the mark of the last batch.

    After each failure in a row it waits the next of `waits`, in seconds, none of them for local files. Raises UserError
    for the failure after the last of them, and for data that cannot be read.
    """

    def __init__(
        self, stream: Stream, name: str, waits: Sequence[float] = WAITS, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._stream, self._name, self._waits, self._sleep = stream, name, waits, sleep

    def batches(self, size: int, mark: Any = None) -> Iterator[tuple[list, Any]]:
        failures = 0
        while True:
            try:
                for batch, after in self._stream.batches(size, mark):
                    mark, failures = after, 0
                    yield batch, after
                return
            except Exception as error:
                is_transient = _is_transient(error)
                if not is_transient and not isinstance(error, OSError | ValueError):  # Arrow's errors are ValueErrors
                    raise
                if not is_transient or failures == len(self._waits):
                    raise UserError(self._name, hint=f"cannot be read on: {_one_line(error)}") from error
                wait, failures = self._waits[failures], failures + 1
                message = f"{self._name}: {_one_line(error)}; trying again at the same row in {wait} s"
                logging.getLogger("flame").warning(message)
                self._sleep(wait)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _is_transient(error: Exception) -> bool:
    """Whether an error is one of the network's, which may be over in a while."""
    if isinstance(error, OSError | asyncio.TimeoutError):
        return not isinstance(error, PERMANENT_ERRORS)
    return type(error).__module__.partition(".")[0] in ("aiohttp", "httpx", "httpcore", "fsspec")
