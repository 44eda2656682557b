"""A lane: one independent stream of rows over its own slice of every source, with a state of counters.

A lane made from the state() of another, in another process, goes on with the rows that the other would have made.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flame.data import mixture
from flame.data.cursor import Cursor, Place
from flame.errors import UserError


class LaneState(NamedTuple):
    """All a lane remembers; open: index of the source of the open document or -1; offset: tokens of it already used."""

    open: int
    offset: int
    deficits: tuple[float, ...]
    places: tuple[Place, ...]


class Lane:
    """Rows of seq_len + 1 tokens cut from the concatenated documents of the mixture; state: where to begin.

    A source that is exhausted is left out, and the shares of the others grow by the same factor.
    """

    def __init__(self, cursors: Sequence[Cursor], shares: Sequence[float], seq_len: int, state: LaneState) -> None:
        self._cursors, self._all_shares, self._seq_len = cursors, shares, seq_len
        self._open, self._offset, self._deficits = state.open, state.offset, state.deficits
        if self._open >= 0 and cursors[self._open].exhausted:  # a restart with fewer epochs than there were
            self._open = -1
        self._update_shares()

    def row(self) -> tuple[np.ndarray, list[int], list[int]] | None:
        """The next row, int32 (seq_len + 1,), the indices in it at which a document begins, and its pieces' sources.

        None when the sources are exhausted before a row is full; the state is then that of no row. Raises UserError if
        the open document is shorter than the state says.
        """
        need = self._seq_len + 1
        row, fill, starts, sources = np.empty(need, np.int32), 0, [], []
        while fill < need:
            if self._open < 0:
                if not any(self._shares):
                    return None
                self._open, self._offset = mixture.pick(self._deficits, self._shares), 0
                if self._cursors[self._open].document() is None:
                    self._open = -1
                    self._update_shares()
                    continue
                starts.append(fill)
            cursor = self._cursors[self._open]
            ids = cursor.document()
            assert ids is not None, "a source with an open document is not exhausted"
            if self._offset >= len(ids):
                hint = "not the text or the tokenizer that the checkpoint was made with"
                raise UserError(f"source {cursor.name}", hint=hint)
            n = min(need - fill, len(ids) - self._offset)
            row[fill : fill + n] = ids[self._offset : self._offset + n]
            fill, self._offset = fill + n, self._offset + n
            sources.append(self._open)
            cursor.count_tokens(n)
            if self._offset == len(ids):
                cursor.advance()
                self._deficits = mixture.charge(self._deficits, self._shares, self._open, len(ids))
                self._open = -1
        return row, starts, sources

    def _update_shares(self) -> None:
        left = [0.0 if c.exhausted else share for c, share in zip(self._cursors, self._all_shares, strict=True)]
        self._shares = mixture.normalize(left) if any(left) else tuple(left)

    def state(self) -> LaneState:
        """The state after the last row: a copy of a few counters."""
        offset = self._offset if self._open >= 0 else 0
        return LaneState(self._open, offset, self._deficits, tuple(cursor.state() for cursor in self._cursors))


def dump_state(state: LaneState, names: Sequence[str]) -> str:
    """A lane's state as JSON, its sources under their names."""
    sources: Mapping[str, list] = {
        name: [deficit, *(place if place.mark is not None else place[:-1])]
        for name, deficit, place in zip(names, state.deficits, state.places, strict=True)
    }
    opened = names[state.open] if state.open >= 0 else None
    return json.dumps({"open": opened, "offset": state.offset, "sources": sources}, separators=(",", ":"))


def parse_state(text: str, names: Sequence[str], fresh: LaneState) -> LaneState:
    """The state in such JSON for today's sources; fresh: a new lane's state, from which new sources start.

    Sources that are gone are dropped, and with them the open document if it was of one.
    """
    saved = json.loads(text)
    known = saved["sources"]
    opened = names.index(saved["open"]) if saved["open"] in names else -1
    deficits, places = list(fresh.deficits), list(fresh.places)
    for i, name in enumerate(names):
        if name in known:
            deficits[i], places[i] = known[name][0], Place(*known[name][1:])
    return LaneState(opened, saved["offset"] if opened >= 0 else 0, tuple(deficits), tuple(places))
