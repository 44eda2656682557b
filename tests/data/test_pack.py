import numpy as np

from flame.data.pack import mark_documents, shift

# Two rows of 6 + 1 tokens. Row 0: a document that began earlier ends with E at index 1; another of 4 tokens, E at 5;
# the next begins at index 6, which only the labels see. Row 1: one document from the row's start on.
E = 9
ROWS = [np.array([5, E, 1, 2, 3, E, 7], np.int32), np.array([1, 2, 3, 4, 5, 6, 8], np.int32)]
STARTS = [[2, 6], [0]]


def test_labels_are_the_next_tokens():
    inputs, labels = shift(ROWS)
    assert inputs.dtype == labels.dtype == np.int64
    assert inputs.tolist() == [[5, E, 1, 2, 3, E], [1, 2, 3, 4, 5, 6]]
    assert labels.tolist() == [[E, 1, 2, 3, E, 7], [2, 3, 4, 5, 6, 8]]


def test_documents_are_marked_as_worked_out_by_hand():
    _, labels = shift(ROWS)
    marked, positions, cu_seqlens = mark_documents(labels, STARTS)
    assert marked.tolist() == [[E, -100, 2, 3, E, -100], [2, 3, 4, 5, 6, 8]]
    assert positions.tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert cu_seqlens.tolist() == [0, 2, 6, 12] and cu_seqlens.dtype == np.int32
    assert labels[0, 1] == 1, "the caller's labels stay as they were"


def test_pieces_longer_than_context_len_are_split_and_keep_the_target_across_the_cut():
    _, labels = shift(ROWS)
    marked, positions, cu_seqlens = mark_documents(labels, STARTS, context_len=3)
    assert marked.tolist() == [[E, -100, 2, 3, E, -100], [2, 3, 4, 5, 6, 8]]
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 0, 1, 2]]
    assert cu_seqlens.tolist() == [0, 2, 5, 6, 9, 12]
