import threading
import time
from itertools import count

import pytest

from flame.data.prefetch import read_ahead


def test_items_come_in_order_and_are_made_no_further_ahead_than_asked():
    made = []

    def items():
        for i in count():
            made.append(i)
            yield i

    ahead = read_ahead(items(), 3)
    assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
    time.sleep(0.1)
    assert len(made) <= 5 + 3 + 1  # taken, waiting, and one in the making
    ahead.close()


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield 1
        raise KeyError("lost")

    ahead = read_ahead(items(), 2)
    assert next(ahead) == 1
    with pytest.raises(KeyError, match="lost"):
        next(ahead)


def test_closing_ends_the_thread():
    before = threading.active_count()
    ahead = read_ahead(count(), 2)
    next(ahead)
    ahead.close()
    assert threading.active_count() == before


def test_items_that_end_end_here_too_and_the_thread_with_them():
    before = threading.active_count()
    assert list(read_ahead(iter(range(5)), 2)) == [0, 1, 2, 3, 4]
    assert threading.active_count() == before
