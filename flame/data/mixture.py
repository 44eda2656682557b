"""Which source the next document of a lane comes from, so that the sources' shares of tokens are the ones asked for.

Each lane keeps one credit a source, in tokens: what the source's share entitles it to, less what it was given. The
largest for its share is next, as in stride scheduling (Waldspurger and Weihl, 1995). Credits are counted in tokens and
stay within a few documents of zero, so that new weights on resume take effect at once.
"""

from collections.abc import Sequence

import numpy as np

GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly however many of them there are


def normalize(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights to shares that sum to 1."""
    total = sum(weights)
    return tuple(w / total for w in weights)


def open_credits(lane: int, shares: Sequence[float], lengths: Sequence[float]) -> tuple[float, ...]:
    """The credits a lane starts with; lengths: the tokens of a document of each source, about.

    Lanes that all started alike would all draw their long documents at the same time, and the shares would be wrong
    until many were read. So each lane has a phase, a point on a circle that the sources divide by their shares. A lane
    first draws the source its phase lies in; every other source waits until the lanes a share's width ahead are through
    with a document of it, or those two shares ahead with their second, and so on round the circle.
    """
    ends = np.cumsum(shares)
    around = ((lane + 0.5) * GOLDEN - (ends - np.asarray(shares))) % 1.0
    turns = (around / np.asarray(shares)).astype(int).tolist()
    return tuple(
        -turn * length * share / (1 - share) if turn else 0.0
        for turn, length, share in zip(turns, lengths, shares, strict=True)
    )


def pick(credits: Sequence[float], shares: Sequence[float]) -> int:
    """Index of the source with the largest credit for its share (the first of equals); a share of 0 is never next."""
    return max((i for i, share in enumerate(shares) if share), key=lambda i: credits[i] / shares[i])


def charge(credits: Sequence[float], shares: Sequence[float], source: int, tokens: int) -> tuple[float, ...]:
    """The credits after a document of so many tokens was taken from source."""
    return tuple(
        c + share * tokens - (tokens if i == source else 0)
        for i, (c, share) in enumerate(zip(credits, shares, strict=True))
    )
