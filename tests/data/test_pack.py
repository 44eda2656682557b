import numpy as np

from flame.data.pack import find_pieces, label

# Two rows of 6 + 1 tokens. Row 0: a document that began earlier ends with E at index 1; another of 4 tokens, E at 5;
# the next begins at index 6, which only the labels see. Row 1: one document from the row's start on.
E = 9
ROWS = [np.array([5, E, 1, 2, 3, E, 7], np.int32), np.array([1, 2, 3, 4, 5, 6, 8], np.int32)]
STARTS = [[2, 6], [0]]


def test_labels_are_the_next_tokens():
    labels = [label(row) for row in ROWS]
    assert [row.tolist() for row in labels] == [[E, 1, 2, 3, E, 7], [2, 3, 4, 5, 6, 8]]
    assert labels[0].dtype == np.int32 and label(ROWS[1], []).tolist() == [2, 3, 4, 5, 6, 8]


def test_targets_that_open_a_document_are_ignored():
    labels = [label(row, starts).tolist() for row, starts in zip(ROWS, STARTS, strict=True)]
    assert labels == [[E, -100, 2, 3, E, -100], [2, 3, 4, 5, 6, 8]]
    assert ROWS[0][2] == 1, "the tokens stay as they were"


def test_pieces_are_those_worked_out_by_hand():
    positions, cu_seqlens = find_pieces(STARTS, 6)
    assert positions.tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]] and positions.dtype == np.int64
    assert cu_seqlens.tolist() == [0, 2, 6, 12] and cu_seqlens.dtype == np.int32


def test_pieces_longer_than_context_len_are_split():
    positions, cu_seqlens = find_pieces(STARTS, 6, context_len=3)
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 0, 1, 2]]
    assert cu_seqlens.tolist() == [0, 2, 5, 6, 9, 12]
