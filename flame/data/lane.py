"""A lane: one independent stream of rows over its own slice of every source, with a state of counters.

A lane made from the state of another, in another process, goes on with the rows that the other would have made.

The sources get their shares of tokens by deficit round-robin (Shreedhar and Varghese, 1995): each lane keeps a deficit
per source, the tokens that its share entitles it to less those it has given, and the next document is of the source
with the largest deficit for its share. Deficits stay within a few documents of zero, so that new weights on resume take
effect at once.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flame.config.files import parse_json
from flame.data.cursor import Cursor
from flame.data.window import Place
from flame.errors import UserError

GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly however many of them there are


class LaneState(NamedTuple):
    """All a lane remembers; open: index of the source of the open document or -1; offset: tokens of it already used."""

    open: int
    offset: int
    deficits: tuple[float, ...]
    places: tuple[Place, ...]


class Row(NamedTuple):
    """seq_len + 1 tokens, int32; where documents begin in them; the source of each piece; the lane's state after it."""

    tokens: np.ndarray
    starts: list[int]
    sources: list[int]
    state: LaneState


class Lane:
    """Rows of seq_len + 1 tokens cut from the concatenated documents of the mixture; state: where to begin.

    A source that is exhausted is left out, and the shares of the others grow by the same factor. The rows end when the
    sources are exhausted before one is full. Raises UserError if the open document is shorter than the state says.
    """

    def __init__(self, cursors: Sequence[Cursor], shares: Sequence[float], seq_len: int, state: LaneState) -> None:
        self._cursors, self._all_shares, self._seq_len = cursors, shares, seq_len
        self._open, self._offset, self._deficits = state.open, state.offset, state.deficits
        if self._open >= 0 and cursors[self._open].exhausted:  # a restart with fewer epochs than there were
            self._open = -1
        self._update_shares()

    def __iter__(self) -> Iterator[Row]:
        need = self._seq_len + 1
        while True:
            tokens, fill, starts, sources = np.empty(need, np.int32), 0, [], []
            while fill < need:
                if self._open < 0:
                    if not any(self._shares):
                        return
                    self._open, self._offset = pick(self._deficits, self._shares), 0
                    if self._cursors[self._open].document() is None:
                        self._open = -1
                        self._update_shares()
                        continue
                    starts.append(fill)
                sources.append(self._open)
                fill += self._copy(tokens[fill:])
            offset = self._offset if self._open >= 0 else 0
            places = tuple(cursor.place for cursor in self._cursors)
            yield Row(tokens, starts, sources, LaneState(self._open, offset, self._deficits, places))

    def _copy(self, row: np.ndarray) -> int:
        """Copy what fits of the open document into the rest of a row; returns the number of tokens."""
        cursor = self._cursors[self._open]
        ids = cursor.document()
        assert ids is not None, "a source with an open document is not exhausted"
        if self._offset >= len(ids):
            hint = "not the text or the tokenizer that the checkpoint was made with"
            raise UserError(f"source {cursor.name}", hint=hint)
        n = min(len(row), len(ids) - self._offset)
        row[:n] = ids[self._offset : self._offset + n]
        self._offset += n
        cursor.count_tokens(n)
        if self._offset == len(ids):
            cursor.advance()
            self._deficits = charge(self._deficits, self._shares, self._open, len(ids))
            self._open = -1
        return n

    def _update_shares(self) -> None:
        left = [0.0 if c.exhausted else share for c, share in zip(self._cursors, self._all_shares, strict=True)]
        self._shares = normalize(left) if any(left) else tuple(left)


def dump_state(state: LaneState, names: Sequence[str]) -> str:
    """A lane's state as JSON, its sources under their names."""
    sources: Mapping[str, list] = {
        name: [deficit, *(place if place.mark is not None else place[:-1])]
        for name, deficit, place in zip(names, state.deficits, state.places, strict=True)
    }
    opened = names[state.open] if state.open >= 0 else None
    return json.dumps({"open": opened, "offset": state.offset, "sources": sources}, separators=(",", ":"))


def parse_state(text: str, names: Sequence[str], fresh: LaneState, longer: int = 0) -> LaneState:
    """The state in such JSON for today's sources; fresh: a new lane's state, from which new sources start.

    Sources that are gone are dropped, and with them the open document if it was of one. longer: ids that the open
    document has more at its beginning than it had.
    """
    saved = parse_json(text)
    known = saved["sources"]
    opened = names.index(saved["open"]) if saved["open"] in names else -1
    deficits, places = list(fresh.deficits), list(fresh.places)
    for i, name in enumerate(names):
        if name in known:
            deficits[i], places[i] = known[name][0], Place(*known[name][1:])
    offset = max(saved["offset"] + longer, 0) if opened >= 0 else 0
    return LaneState(opened, offset, tuple(deficits), tuple(places))


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
