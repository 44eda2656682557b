"""Items of several iterators in turn, made ahead by threads."""

import atexit
import threading
from collections.abc import Generator, Iterator, Sequence
from heapq import heappop, heappush
from itertools import cycle
from typing import Any, TypeVar

Item = TypeVar("Item")
END = object()


def read_in_turn(parts: Sequence[Iterator[Item]], workers: int = 0, ahead: int = 1) -> Generator[Item, None, None]:
    """One item of each part, round and round, up to the turn of a part that has none left.

    With workers, so many threads make them in the background, at most `ahead` items ahead of the reader. A thread takes
    on whichever part is due first of those that no other is at, so that one slow item holds up its own part alone. An
    error of a part is raised at its turn, after the items before it. Closing the iterator ends the threads.
    """
    if workers:
        yield from _read_ahead(parts, workers, ahead)
        return
    for part in cycle(parts):
        item = next(part, END)
        if item is END:
            return
        yield item  # type: ignore[misc]


def _read_ahead(parts: Sequence[Iterator[Item]], workers: int, ahead: int) -> Generator[Item, None, None]:
    work = _Work(parts, ahead)
    threads = [threading.Thread(target=work.run, name="flame-data", daemon=True) for _ in range(workers)]

    def end() -> None:
        work.stop()
        for thread in threads:
            thread.join(timeout=10)  # it may be waiting for the network; a daemon does not keep the process

    atexit.register(end)  # a thread that is in Rust while the interpreter goes away would abort the process
    for thread in threads:
        thread.start()
    try:
        while (item := work.take()) is not END:
            yield item
    finally:
        atexit.unregister(end)
        end()


class _Work:
    """Turn t is the next item of part t % len(parts); what threads and reader know of the turns, under one lock."""

    def __init__(self, parts: Sequence[Iterator[Any]], ahead: int) -> None:
        self._parts, self._ahead = parts, ahead
        self._due = list(range(len(parts)))  # a heap: the next turn of each part that no thread is at
        self._made: dict[int, Any] = {}  # turn: its item, END or _Error
        self._taken = 0
        self._stopped = False
        lock = threading.Lock()
        # Each wakes whom it concerns: a thread that wakes for nothing costs as much as a short row.
        self._ready, self._room = threading.Condition(lock), threading.Condition(lock)

    def take(self) -> Any:
        """The item of the next turn, waited for; END behind the last."""
        with self._ready:
            self._ready.wait_for(lambda: self._taken in self._made)
            item = self._made.pop(self._taken)
            self._taken += 1
            self._room.notify()
        if isinstance(item, _Error):
            raise item.error
        return item

    def stop(self) -> None:
        with self._room:
            self._stopped = True
            self._room.notify_all()

    def run(self) -> None:
        """Make items until stopped; what a thread does."""
        while True:
            with self._room:
                self._room.wait_for(self._may_go_on)
                if self._stopped:
                    return
                turn = heappop(self._due)
            item: Any
            try:
                item = next(self._parts[turn % len(self._parts)], END)
            except BaseException as error:  # whatever it is, it is the reader's to raise
                item = _Error(error)
            with self._ready:
                self._made[turn] = item
                if item is not END and not isinstance(item, _Error):
                    heappush(self._due, turn + len(self._parts))
                    self._room.notify()
                if turn == self._taken:
                    self._ready.notify()

    def _may_go_on(self) -> bool:
        return self._stopped or bool(self._due and self._due[0] < self._taken + self._ahead)


class _Error:
    """In an item's place: what kept it from being made."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
