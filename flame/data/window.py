"""Windows of a source, permuted and dealt to the lanes, with counters for state instead of a buffer.

Window w is rows w*N .. w*N + N - 1. Its order is drawn by a counter-based generator keyed (seed, source, epoch,
window); permuted place p goes to lane (p + shift) % L, the shift from the same generator. So each row is read once per
epoch by exactly one lane, every lane gets some of every source, and a source of fewer rows than lanes is shared too.
"""

import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from flame.data.document import Bad, Document
from flame.errors import UserError


class Rows(Protocol):
    """Rows with random access."""

    def __len__(self) -> int: ...

    def texts(self, indices: list[int]) -> list[Document | Bad]: ...


@runtime_checkable
class Stream(Protocol):
    """Rows in one order only: batches from a mark on (None: the start), each with the mark after it."""

    def batches(self, size: int, mark: Any = None) -> Iterator[tuple[list[Document | Bad], Any]]: ...


class Place(NamedTuple):
    """Where a lane is in one source; at: document of its slice of the window; mark: a stream's, before the window."""

    epoch: int = 0
    window: int = 0
    at: int = 0
    tokens: int = 0
    documents: int = 0
    skipped: int = 0
    mark: Any = None


@dataclass(frozen=True)
class WindowShuffle:
    """How the windows of one source are shuffled: `size` rows per window, dealt to `lanes` lanes."""

    source: str
    size: int
    lanes: int
    seed: int

    def permute(self, epoch: int, window: int, rows: int) -> tuple[np.ndarray, int]:
        """The order of a window's rows (at most `size`), and the shift."""
        key = [
            ((self.seed & 0xFFFFFFFF) << 32) + zlib.crc32(self.source.encode(errors="surrogateescape")),
            (epoch << 32) + window,
        ]
        rng = np.random.Generator(np.random.Philox(key=key))
        return rng.permutation(rows), int(rng.integers(self.lanes))

    def may_have_read(self, place: Place, rows: int) -> bool:
        """Whether a lane of a source of so many rows may have read as many in whole windows as its place counts."""
        whole, rest = divmod(rows, self.size)

        def sum_slices(share: Callable[[int], int]) -> int:
            epoch = whole * share(self.size) + share(rest)
            return (
                place.epoch * epoch + min(place.window, whole) * share(self.size) + (place.window > whole) * share(rest)
            )

        fewest, most = sum_slices(lambda size: size // self.lanes), sum_slices(lambda size: -(-size // self.lanes))
        return fewest <= place.documents + place.skipped - place.at <= most

    def slice(self, order: np.ndarray, shift: int, lane: int) -> np.ndarray:
        """A lane's rows in that order, counted from the window's first."""
        return order[(lane - shift) % self.lanes :: self.lanes]


@dataclass(frozen=True)
class WindowSlice:
    """A lane's rows of a window, `size` of them, of which `read` gives a slice.

    after: the stream's mark after the window (None with random access).
    """

    size: int
    read: Callable[[slice], list[Document | Bad]]
    after: Any = None


class IndexedWindows:
    """Windows of rows with random access: a lane reads its own rows alone, and each only when it is asked for."""

    def __init__(self, rows: Rows, shuffle: WindowShuffle) -> None:
        self.rows, self.shuffle = rows, shuffle

    def take(self, lane: int, epoch: int, window: int) -> WindowSlice | None:
        """The lane's slice of a window; None after the last window of the epoch."""
        first = window * self.shuffle.size
        count = min(self.shuffle.size, len(self.rows) - first)
        if count <= 0:
            return None
        order, shift = self.shuffle.permute(epoch, window, count)
        chosen = (self.shuffle.slice(order, shift, lane) + first).tolist()
        return WindowSlice(len(chosen), lambda part: self.rows.texts(chosen[part]))


class StreamedWindows:
    """Windows of a stream: one reader for all lanes of a rank, which keeps what some of them have yet to take.

    places: for each lane where it is. The reader starts at the earliest of them. Lanes take their windows in order,
    from any thread.
    """

    def __init__(self, stream: Stream, shuffle: WindowShuffle, places: Mapping[int, Place]) -> None:
        self.stream, self.shuffle = stream, shuffle
        self._lock = threading.Lock()
        self._next = {lane: place[:2] for lane, place in places.items()}
        self._epoch, self._window = first = min(self._next.values())
        mark = next((p.mark for p in places.values() if p[:2] == first and p.mark is not None), None)
        if mark is None:
            self._window = 0  # without a mark, the epoch is read again from its start
        self._batches = stream.batches(shuffle.size, mark)
        self._held: dict[tuple[int, int], dict[int, WindowSlice]] = {}
        self._ends: dict[int, int] = {}  # epoch -> its number of windows

    def take(self, lane: int, epoch: int, window: int) -> WindowSlice | None:
        """The lane's slice of a window; None after the last window of the epoch."""
        with self._lock:
            assert (epoch, window) >= self._next[lane], "a lane takes its windows in order"
            while (epoch, window) not in self._held:
                if window >= self._ends.get(epoch, window + 1):
                    self._next[lane] = (epoch + 1, 0)
                    return None
                self._read()
            self._next[lane] = (epoch, window + 1)
            slices = self._held[epoch, window]
            taken = slices.pop(lane)
            if not slices:
                del self._held[epoch, window]
            return taken

    def _read(self) -> None:
        """Read one window and keep the slices of the lanes that have not passed it."""
        epoch, window = self._epoch, self._window
        batch = next(self._batches, None)
        if batch is None:
            if window == 0:
                raise UserError(f"source {self.shuffle.source}", "a stream without rows")
            self._ends[epoch] = window
            self._epoch, self._window = epoch + 1, 0
            self._batches = self.stream.batches(self.shuffle.size)
            return
        rows, after = batch
        self._window += 1
        waiting = [lane for lane, place in self._next.items() if place <= (epoch, window)]
        if waiting:
            order, shift = self.shuffle.permute(epoch, window, len(rows))
            slices = self._held[epoch, window] = {}
            for lane in waiting:
                chosen = [rows[i] for i in self.shuffle.slice(order, shift, lane)]
                slices[lane] = WindowSlice(len(chosen), chosen.__getitem__, after)
