"""Rows to model inputs: labels, and with varlen what keeps packed documents apart."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torchtitan.components.loss import IGNORE_INDEX


def label(tokens: np.ndarray, starts: Sequence[int] = ()) -> np.ndarray:
    """The next token of each but the last of a row's seq + 1 tokens, (seq,), or -100 where that opens a document.

    starts: indices at which documents begin; none, and every target stays.
    """
    labels = tokens[1:].copy()
    labels[[start - 1 for start in starts if start > 0]] = IGNORE_INDEX
    return labels


def find_pieces(
    starts: Sequence[Sequence[int]], seq: int, context_len: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and cu_seqlens of packed rows.

    starts: for each row the indices, within its seq + 1 tokens, at which a document begins. A piece is the part of a
    document that lies in one row, cut again every context_len tokens.
    Returns positions int64 (batch, seq), counted from the start of the piece; cu_seqlens int32 (pieces + 1,): the
    pieces' starts in the flattened (batch * seq) inputs and, last, batch * seq.
    """
    positions, cuts = np.empty((len(starts), seq), np.int64), []
    for row, opened in enumerate(starts):
        documents = [0, *(s for s in opened if 0 < s < seq), seq]
        for begin, end in pairwise(documents):
            for cut in range(begin, end, context_len or seq):
                stop = min(end, cut + (context_len or seq))
                positions[row, cut:stop] = np.arange(stop - cut)
                cuts.append(row * seq + cut)
    return positions, np.array([*cuts, len(starts) * seq], np.int32)
