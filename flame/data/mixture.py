"""Which source the next document of a lane comes from, so that the sources' shares of tokens are the ones asked for.

Each lane keeps one credit a source, in tokens: what the source's share entitles it to, less what it was given. The
largest credit is next. Credits stay within about a document of zero, so new weights on resume take effect at once.
"""

from collections.abc import Sequence

import numpy as np

GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly however many of them there are


def normalize(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights to shares that sum to 1."""
    total = sum(weights)
    return tuple(w / total for w in weights)


def open_credits(lane: int, shares: Sequence[float], lengths: Sequence[float]) -> tuple[float, ...]:
    """The credits a lane starts with; lengths: the mean tokens of a document of each source.

    Lanes that all started alike would all draw their long documents at the same time, and the shares would be wrong
    until many were read. So each lane has a phase, a point on a circle that the sources divide by their shares. A lane
    first draws the source its phase lies in; another source waits one document's length for each share-wide stretch of
    the circle between them, so that when the first lanes are done with that source's documents the next ones take over.
    """
    phase = (lane + 0.5) * GOLDEN
    starts = np.cumsum([0.0, *shares[:-1]])
    around = (phase - starts) % 1.0
    return tuple(
        0.0 - length * share * int(distance / share)
        for length, share, distance in zip(lengths, shares, around.tolist(), strict=True)
    )


def pick(credits: Sequence[float]) -> int:
    """Index of the source with the largest credit (the first of equals)."""
    return max(range(len(credits)), key=credits.__getitem__)


def charge(credits: Sequence[float], shares: Sequence[float], source: int, tokens: int) -> tuple[float, ...]:
    """The credits after a document of so many tokens was taken from source."""
    return tuple(
        c + share * tokens - (tokens if i == source else 0)
        for i, (c, share) in enumerate(zip(credits, shares, strict=True))
    )
