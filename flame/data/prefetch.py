"""Items of several iterators in turn, made ahead by threads."""

import atexit
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from itertools import count
from queue import PriorityQueue
from typing import TypeVar

Item = TypeVar("Item")
END = object()
STOP = -1  # in the place of a turn, before all turns


def read_in_turn(parts: Sequence[Iterator[Item]], workers: int = 0, ahead: int = 1) -> Generator[Item, None, None]:
    """One item of each part, round and round, up to the turn of a part that has none left.

    With workers, so many threads make them in the background, at most `ahead` items ahead of the reader. A thread takes
    the part that is due first of those that no other thread is at, so that one slow item holds up its own part alone.
    An error of a part is raised at its turn, after the items before it. Closing the iterator ends the threads.
    """
    # Turn t is the next item of part t % len(parts). It is due once the part's turn before it is made.
    items: dict[int, Future] = {}  # of the turns from the reader's on
    due: PriorityQueue[int] = PriorityQueue()
    ahead = ahead if workers else 1

    def allow(turn: int) -> None:
        items[turn] = Future()
        before = items.get(turn - len(parts))  # not there: taken, or before the first
        if before is None:
            due.put(turn)
        else:
            before.add_done_callback(lambda _: due.put(turn))

    def make(turn: int) -> None:
        try:
            items[turn].set_result(next(parts[turn % len(parts)], END))
        except BaseException as error:  # it is the reader's to raise
            items[turn].set_exception(error)

    def work() -> None:
        while (turn := due.get()) != STOP:
            make(turn)

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
            if not threads:
                make(due.get())
            item = items[turn].result()
            allow(turn + ahead)
            del items[turn]
            if item is END:
                return
            yield item
    finally:
        atexit.unregister(end)
        end()
