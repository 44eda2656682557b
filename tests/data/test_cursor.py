import pytest

from flame.data.cursor import GROUP, Cursor
from flame.data.window import IndexedWindows, Place, StreamedWindows, WindowShuffle
from tests.data.fakes import EOS, Bytes, Tape, Texts, documents

START = Place()
ROWS = documents("a", 61, 9000)  # about two of them to a block
for i in (0, 1, 2, 7, 8, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 59, 60):
    ROWS[i] = (None, "")[i % 2]  # a bad row alone, whole groups of them, the first and the last of a window


def cursor(place=START, rows=ROWS, kind=Texts, size=32, epochs=2):
    shuffle = WindowShuffle("a", size, 2, 0)
    if kind is Texts:
        windows = IndexedWindows(Texts(rows), shuffle)
    else:
        windows = StreamedWindows(Tape(rows), shuffle, {1: place})
    return Cursor("a", windows, 1, Bytes(), place, epochs)


def walk(cursor):
    """Every document that is left, and the place before each."""
    while True:
        place = cursor.place
        ids = cursor.document()
        if ids is None:
            return
        yield place, bytes(ids[:-1].tolist()).decode()
        assert ids[-1] == EOS
        cursor.advance()


@pytest.mark.parametrize("kind", [Texts, Tape])
@pytest.mark.parametrize("size", [16, 32, 200])
def test_a_cursor_started_at_any_place_continues_with_the_same_documents_and_counts(kind, size):
    whole = cursor(kind=kind, size=size)
    walked = list(walk(whole))
    texts = [text for _, text in walked]
    assert len(texts) > 20 and set(texts) < set(ROWS)
    for i, (place, _) in enumerate(walked):
        again = cursor(place, kind=kind, size=size)
        assert [text for _, text in walk(again)] == texts[i:]
        assert again.place == whole.place


def test_lanes_count_every_row_of_an_epoch_once_as_a_document_or_as_bad():
    rows = [0, 0]
    for lane in range(2):
        read = cursor(epochs=1)
        read.lane = lane
        list(walk(read))
        rows[0] += read.place.documents
        rows[1] += read.place.skipped
    assert rows == [61 - 19, 19]


def test_of_a_large_window_only_the_next_rows_are_read():
    class Watched(Texts):
        read = 0

        def texts(self, indices):
            Watched.read += len(indices)
            return super().texts(indices)

    rows = Watched(documents("a", 2000, 9000))
    it = walk(Cursor("a", IndexedWindows(rows, WindowShuffle("a", 2000, 1, 0)), 0, Bytes(), Place()))
    for taken in range(1, 100):
        next(it)
        assert taken <= Watched.read <= taken + 2 * GROUP
