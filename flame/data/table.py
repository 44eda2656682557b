"""Rows of `datasets`: random access or a stream's position, and nothing else of it; shuffling is the windows' work."""

import asyncio
import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flame.data.document import Bad, Document, accept
from flame.data.window import Stream

WAITS = (1, 2, 4, 8, 16, 32, *[60] * 20)  # seconds; some 20 minutes, within --comm.train_timeout_seconds
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

    if not pyarrow.types.is_string(column.type) and not pyarrow.types.is_large_string(column.type):
        return [row.values.to_numpy(zero_copy_only=False) if row.is_valid else None for row in column]
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast(pyarrow.large_binary()).to_pylist()


class RetryingStream:
    """A stream that outlives network failures: it is read on from the mark of the last batch.

    After each failure in a row it waits the next of `waits`, in seconds; the failure after the last of them is raised.
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
                if not _is_transient(error) or failures == len(self._waits):
                    raise
                wait, failures = self._waits[failures], failures + 1
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                logging.getLogger("flame").warning(f"{self._name}: {reason}; trying again at the same row in {wait} s")
                self._sleep(wait)


def _is_transient(error: Exception) -> bool:
    """Whether an error is one of the network's, which may be over in a while."""
    if isinstance(error, OSError | asyncio.TimeoutError):
        return not isinstance(error, PERMANENT_ERRORS)
    return type(error).__module__.partition(".")[0] in ("aiohttp", "httpx", "httpcore", "fsspec")
