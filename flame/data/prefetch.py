"""Items made ahead by a thread of their own."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def read_ahead(items: Iterator[Item], depth: int) -> Generator[Item, None, None]:
    """The same items, made in the background, at most depth of them waiting.

    An error of the thread is raised here, after the items made before it. Closing the iterator ends the thread.
    """
    ready: queue.Queue[Item | _End] = queue.Queue(depth)
    stop = threading.Event()
    thread = threading.Thread(target=_fill, args=(items, ready, stop), name="flame-data", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if not isinstance(item, _End):
                yield item
            elif item.error is None:
                return
            else:
                raise item.error
    finally:
        stop.set()
        while not ready.empty():  # room for the one item that the thread may be waiting to put
            ready.get_nowait()
        thread.join(timeout=10)  # it may be waiting for the network; a daemon does not keep the process


class _End:
    """Behind the last item; error: what ended them before their end."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def _fill(items: Iterator[Item], ready: "queue.Queue[Item | _End]", stop: threading.Event) -> None:
    try:
        for item in items:
            if stop.is_set():
                return
            ready.put(item)
        ready.put(_End(None))
    except BaseException as error:  # whatever it is, it is the reader's to raise
        ready.put(_End(error))
