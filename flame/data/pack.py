"""Rows to model inputs: the shift by one, and with varlen what keeps packed documents apart."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torchtitan.components.loss import IGNORE_INDEX


def shift(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of seq_len + 1 tokens to inputs and labels, each int64 (batch, seq); the labels are the next tokens."""
    tokens = np.stack(rows)
    return tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)


def mark_documents(
    labels: np.ndarray, starts: Sequence[Sequence[int]], context_len: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels without foreign targets, positions, and cu_seqlens of packed rows.

    labels: int64 (batch, seq). starts: for each row the indices, within its seq_len + 1 tokens, at which a document
    begins. A piece is the part of a document that lies in one row, cut again every context_len tokens.
    Returns labels (batch, seq), -100 where the target opens another document (a cut inside a document keeps its
    target); positions int64 (batch, seq), counted from the start of the piece; cu_seqlens int32 (pieces + 1,): the
    pieces' starts in the flattened (batch * seq) inputs and, last, batch * seq.
    """
    batch, seq = labels.shape
    labels, positions, cuts = labels.copy(), np.empty((batch, seq), np.int64), []
    for row, opened in enumerate(starts):
        targets = [s - 1 for s in opened if s > 0]
        labels[row, targets] = IGNORE_INDEX
        documents = [0, *(s for s in opened if 0 < s < seq), seq]
        for begin, end in pairwise(documents):
            for cut in range(begin, end, context_len or seq):
                stop = min(end, cut + (context_len or seq))
                positions[row, cut:stop] = np.arange(stop - cut)
                cuts.append(row * seq + cut)
    return labels, positions, np.array([*cuts, batch * seq], np.int32)
