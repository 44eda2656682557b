import threading

import pytest

from flame.data.window import IndexedWindows, Place, StreamedWindows, WindowShuffle
from tests.data.fakes import Tape, Texts

SHUFFLE = WindowShuffle("a", size=16, lanes=8, seed=0)
ROWS = [str(i) for i in range(83)]
START = dict.fromkeys(range(8), Place())


def read(part):
    return part.read(slice(part.size))


def epoch(windows, lane, number=0):
    """A lane's rows of one epoch."""
    found, window = [], 0
    while (part := windows.take(lane, number, window)) is not None:
        found += read(part)
        window += 1
    assert window == 6
    return found


@pytest.mark.parametrize("count", [1, 5, 8, 83])
def test_the_lanes_share_out_every_row_once_an_epoch(count):
    windows = IndexedWindows(Texts(ROWS[:count]), SHUFFLE)
    dealt = [row for w in range(6) for lane in range(8) if (part := windows.take(lane, 0, w)) for row in read(part)]
    assert sorted(dealt) == sorted(ROWS[:count])


def test_every_lane_has_a_fair_part_of_every_window():
    windows = IndexedWindows(Texts(ROWS), SHUFFLE)
    assert [windows.take(lane, 0, 1).size for lane in range(8)] == [2] * 8


def test_orders_differ_between_epochs_windows_sources_and_seeds():
    def order(shuffle, epoch, window):
        permuted, shift = shuffle.permute(epoch, window, 16)
        return (*permuted.tolist(), shift)

    others = [WindowShuffle("b", 16, 8, 0), WindowShuffle("a", 16, 8, 1)]
    orders = {
        order(SHUFFLE, 0, 0),
        order(SHUFFLE, 1, 0),
        order(SHUFFLE, 0, 1),
        *(order(other, 0, 0) for other in others),
    }
    assert len(orders) == 5 and order(SHUFFLE, 0, 0) == order(WindowShuffle("a", 16, 8, 0), 0, 0)


def test_a_stream_deals_as_random_access_does_whatever_order_the_lanes_come_in():
    indexed, streamed = IndexedWindows(Texts(ROWS), SHUFFLE), StreamedWindows(Tape(ROWS), SHUFFLE, START)
    for lane in (3, 0, 7, 1, 2, 6, 5, 4):
        assert epoch(streamed, lane) == epoch(indexed, lane)
    assert not streamed._held, "what every lane has taken is let go"
    assert epoch(streamed, 4, 1) == epoch(indexed, 4, 1) != epoch(indexed, 4, 0)


def test_a_stream_restarts_at_the_earliest_lane_and_reads_nothing_before_it():
    streamed = StreamedWindows(Tape(ROWS), SHUFFLE, START)
    places, expected = {}, {}
    for lane in range(8):
        mark = None
        for window in range(2 + lane % 2):
            mark = streamed.take(lane, 0, window).after
        places[lane] = Place(window=2 + lane % 2, mark=mark)
    for lane, place in places.items():
        expected[lane] = read(streamed.take(lane, 0, place.window))

    class Watched(Tape):
        def batches(self, size, mark=None):
            assert mark == {"row": 32}
            return super().batches(size, mark)

    again = StreamedWindows(Watched(ROWS), SHUFFLE, places)
    assert {lane: read(again.take(lane, 0, place.window)) for lane, place in places.items()} == expected
    unmarked = {lane: place._replace(mark=None) for lane, place in places.items()}
    again = StreamedWindows(Tape(ROWS), SHUFFLE, unmarked)
    assert {lane: read(again.take(lane, 0, place.window)) for lane, place in places.items()} == expected


def test_a_stream_is_shared_by_threads():
    streamed, found = StreamedWindows(Tape(ROWS), SHUFFLE, START), {}
    threads = [
        threading.Thread(target=lambda lane=lane: found.update({lane: epoch(streamed, lane)})) for lane in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row for rows in found.values() for row in rows) == sorted(ROWS)
