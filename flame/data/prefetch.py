"""Items of several iterators in turn, made ahead by threads."""

import atexit
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from itertools import count, cycle
from queue import PriorityQueue
from typing import Any, TypeVar

Item = TypeVar("Item")
END = object()
STOP = -1  # in the place of a turn, before all turns


def read_in_turn(parts: Sequence[Iterator[Item]], workers: int = 0, ahead: int = 1) -> Generator[Item, None, None]:
    """One item of each part, round and round, up to the turn of a part that has none left.

    With workers, so many threads make them in the background, at most `ahead` items ahead of the reader. A thread takes
    the part that is due first of those that no other thread is at, so that one slow item holds up its own part alone.
    An error of a part is raised at its turn, after the items before it. Closing the iterator ends the threads.
    """
    if workers:
        yield from _read_ahead(parts, workers, ahead)
        return
    for part in cycle(parts):
        item = next(part, END)
        if item is END:
            return
        yield item  # type: ignore[misc]


def _read_ahead(parts: Sequence[Iterator[Any]], workers: int, ahead: int) -> Generator[Any, None, None]:
    """Turn t is the next item of part t % len(parts): due once turn t - len(parts) is made and t is within `ahead`."""
    items: dict[int, Future] = {}  # of the turns from the reader's on
    due: PriorityQueue[int] = PriorityQueue()

    def allow(turn: int) -> None:
        items[turn] = Future()
        before = items.get(turn - len(parts))  # not there: taken, or before the first
        if before is None:
            due.put(turn)
        else:
            before.add_done_callback(lambda _: due.put(turn))

    def work() -> None:
        while (turn := due.get()) != STOP:
            try:
                items[turn].set_result(next(parts[turn % len(parts)], END))
            except BaseException as error:  # it is the reader's to raise
                items[turn].set_exception(error)

    def end() -> None:
        for _ in threads:
            due.put(STOP)
        for thread in threads:
            thread.join(timeout=10)  # it may be waiting for the network; a daemon does not keep the process

    threads = [threading.Thread(target=work, name="flame-data", daemon=True) for _ in range(workers)]
    atexit.register(end)  # a thread that is in Rust while the interpreter goes away would abort the process
    for thread in threads:
        thread.start()
    try:
        for turn in range(ahead):
            allow(turn)
        for turn in count():
            item = items[turn].result()
            allow(turn + ahead)
            del items[turn]
            if item is END:
                return
            yield item
    finally:
        atexit.unregister(end)
        end()
