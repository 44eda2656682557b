import subprocess
import sys
import threading
import time
from itertools import count, islice

import pytest

from flame.data.prefetch import read_in_turn

WORKERS = (0, 1, 2, 5)


def wait_until(holds):
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def letters(name, length):
    return (f"{name}{i}" for i in range(length))


def broken(name, length):
    yield from letters(name, length)
    raise KeyError("lost")


@pytest.mark.parametrize("workers", WORKERS)
def test_parts_take_turns_until_the_turn_of_one_that_has_ended(workers):
    parts = [letters("a", 3), letters("b", 2), letters("c", 9)]
    assert list(read_in_turn(parts, workers, 4)) == ["a0", "b0", "c0", "a1", "b1", "c1", "a2"]


@pytest.mark.parametrize("workers", WORKERS)
def test_an_error_comes_at_its_turn(workers):
    stream = read_in_turn([letters("a", 9), broken("b", 1)], workers, 6)
    assert list(islice(stream, 3)) == ["a0", "b0", "a1"]
    with pytest.raises(KeyError, match="lost"):
        next(stream)


@pytest.mark.parametrize("workers", WORKERS)
def test_no_order_in_which_threads_finish_changes_the_order_of_items(workers):
    def slow(name, every):
        for i in range(20):
            time.sleep(0.004 if i % every == 0 else 0)
            yield name, i

    stream = read_in_turn([slow(name, every) for name, every in zip("abc", (1, 3, 7), strict=True)], workers, 12)
    assert list(stream) == [(name, i) for i in range(20) for name in "abc"]


def test_threads_are_as_far_ahead_as_asked_and_no_further():
    made = []

    def items(part):
        for i in count():
            made.append(3 * i + part)
            yield made[-1]

    stream = read_in_turn([items(part) for part in range(3)], 2, 7)
    assert list(islice(stream, 5)) == list(range(5))
    wait_until(lambda: len(made) >= 5 + 7)
    stream.close()
    assert sorted(made) == list(range(5 + 7))


def test_a_slow_item_holds_up_its_own_part_alone():
    go_on = threading.Event()

    def waits():
        yield "first"
        go_on.wait(60)
        yield "second"

    made = []
    stream = read_in_turn([waits(), (made.append(i) or i for i in count())], 2, 8)
    assert next(stream) == "first"
    wait_until(lambda: len(made) == 4)  # the other thread went on
    go_on.set()
    assert list(islice(stream, 3)) == [0, "second", 1]
    stream.close()


def test_closing_ends_the_threads():
    before = threading.active_count()
    stream = read_in_turn([count(), count()], 3, 5)
    next(stream)
    assert threading.active_count() == before + 3
    stream.close()
    assert threading.active_count() == before


def test_items_that_end_end_the_threads_too():
    before = threading.active_count()
    assert list(read_in_turn([iter(range(5))], 2, 3)) == list(range(5))
    assert threading.active_count() == before


UNCLOSED = """
import itertools
from fastokens import Tokenizer
from tokenizers import Tokenizer as Backend, models
from flame.data.prefetch import read_in_turn

def items():
    while True:
        yield tokenizer.encode_batch_flat(["abba"] * 99)

tokenizer = Tokenizer.from_json_str(Backend(models.BPE(vocab={"a": 0, "b": 1}, merges=[])).to_str())
stream = read_in_turn([items(), items()], 2, 1 << 15)
list(itertools.islice(stream, 9))
"""


def test_a_process_that_ends_with_a_stream_unclosed_ends_without_an_error():
    done = subprocess.run([sys.executable, "-c", UNCLOSED], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
