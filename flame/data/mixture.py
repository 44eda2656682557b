"""Which source the next document of a lane comes from, so that the sources' shares of tokens are the ones asked for.

Deficit round-robin (Shreedhar and Varghese, 1995) by documents: each lane keeps a deficit per source, the tokens that
its share entitles it to less those it has given, and the source of the largest deficit for its share is next. Deficits
stay within a few documents of zero, so that new weights on resume take effect at once.
"""

from collections.abc import Sequence

import numpy as np

GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly however many of them there are


def normalize(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights to shares that sum to 1."""
    total = sum(weights)
    return tuple(w / total for w in weights)


def initial_deficits(lane: int, shares: Sequence[float], lengths: Sequence[float]) -> tuple[float, ...]:
    """The deficits a lane starts with; lengths: the approximate tokens per document of each source.

    Lanes that all started alike would all draw their long documents at the same time, and the shares would be wrong
    until many were read. So each lane has a phase, a point on a circle that the sources divide by their shares. A lane
    first draws the source its phase lies in. Every other source waits until the lanes one share's width ahead have read
    a document of it, or those two shares ahead their second, and so on round the circle.
    """
    ends = np.cumsum(shares)
    around = ((lane + 0.5) * GOLDEN - (ends - np.asarray(shares))) % 1.0
    turns = (around / np.asarray(shares)).astype(int).tolist()
    return tuple(
        -turn * length * share / (1 - share) if turn else 0.0
        for turn, length, share in zip(turns, lengths, shares, strict=True)
    )


def pick(deficits: Sequence[float], shares: Sequence[float]) -> int:
    """Index of the source with the largest deficit for its share (the first of equals), of those with a share."""
    return max((i for i, share in enumerate(shares) if share), key=lambda i: deficits[i] / shares[i])


def charge(deficits: Sequence[float], shares: Sequence[float], source: int, tokens: int) -> tuple[float, ...]:
    """The deficits after a document of so many tokens was taken from a source."""
    return tuple(
        deficit + share * tokens - (tokens if i == source else 0)
        for i, (deficit, share) in enumerate(zip(deficits, shares, strict=True))
    )
