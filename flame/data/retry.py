"""A stream that outlives network failures: it is read on at the same row, later."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flame.data.window import Stream

logger = logging.getLogger("flame")

WAITS = (1, 2, 4, 8, 16, 32, *[60] * 20)  # seconds; some 20 minutes, within --comm.train_timeout_seconds
PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class RetryingStream:
    """The same stream, read on from the mark of the last batch after it failed.

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
                logger.warning(f"{self._name}: {reason}; trying again at the same row in {wait} s")
                self._sleep(wait)


def _is_transient(error: Exception) -> bool:
    """Whether an error is one of the network's, which may be over in a while."""
    if isinstance(error, OSError | asyncio.TimeoutError):
        return not isinstance(error, PERMANENT_ERRORS)
    return type(error).__module__.partition(".")[0] in ("aiohttp", "httpx", "httpcore", "fsspec")
