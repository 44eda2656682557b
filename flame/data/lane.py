"""A lane: one independent stream of rows over its own part of every source, with a state of counters.

A lane made from the state() of another, in another process, goes on with the rows that the other would have made.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from flame.data import mixture
from flame.data.document import Bad, Document
from flame.data.window import IndexedWindows, Part, StreamedWindows
from flame.errors import UserError

BLOCK = 1 << 16  # characters tokenized in one call, at least: enough for Rust's threads, soon enough for the first step
BARREN = 100  # a source is given up when a lane met no text in this many windows a lane, one after the other


class Encoder(Protocol):
    """What a lane needs of a tokenizer."""

    eos_id: int
    vocab_size: int

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...


class Place(NamedTuple):
    """Where a lane is in one source; at: document of its part of the window; mark: a stream's, before the window."""

    epoch: int = 0
    window: int = 0
    at: int = 0
    tokens: int = 0
    documents: int = 0
    skipped: int = 0
    mark: Any = None


class LaneState(NamedTuple):
    """All a lane remembers; open: index of the source of the open document or -1; offset: tokens of it already used."""

    open: int
    offset: int
    credits: tuple[float, ...]
    places: tuple[Place, ...]


class Cursor:
    """Reads one source for one lane: its part of a window as text, of which a block at a time is tokenized."""

    def __init__(
        self,
        name: str,
        windows: IndexedWindows | StreamedWindows,
        lane: int,
        encoder: Encoder,
        place: Place,
        epochs: int = 0,
        report: Callable[[str, Bad], None] | None = None,
    ) -> None:
        self.name, self.windows, self.lane, self.encoder, self.place = name, windows, lane, encoder, place
        self._epochs, self._report = epochs, report  # 0 epochs: endless
        self._part: Part | None = None
        self._documents: list[Document] = []  # of the part, without its bad rows
        self._ids: list[np.ndarray] = []  # of the documents from _first on
        self._first = 0
        self._tokens = place.tokens

    @property
    def through(self) -> bool:
        """Whether the source was read as many times as asked for."""
        return 0 < self._epochs <= self.place.epoch

    def document(self) -> np.ndarray | None:
        """Ids of the document at hand, EOS last, int32 (length,); None when the source is through."""
        barren = 0
        while self._part is None or self.place.at >= len(self._documents):
            if self.through:
                return None
            if barren > BARREN * self.windows.deal.lanes:
                raise UserError(f"source {self.name}: no document in {barren} windows in a row of lane {self.lane}")
            barren += 1
            self._advance()
        if self.place.at >= self._first + len(self._ids):
            self._encode()
        return self._ids[self.place.at - self._first]

    def spend(self, tokens: int) -> None:
        """Count tokens handed out."""
        self._tokens += tokens

    def close(self) -> None:
        """Go on to the next document."""
        self.place = self.place._replace(at=self.place.at + 1, documents=self.place.documents + 1)
        if self.place.at == len(self._documents):
            self._advance()

    def state(self) -> Place:
        return self.place._replace(tokens=self._tokens)

    def _advance(self) -> None:
        """Leave the window if one is open, else open the one at hand."""
        if self._part is not None:
            skipped = self.place.skipped + len(self._part.rows) - len(self._documents)
            window = self.place.window + 1
            self.place = self.place._replace(window=window, at=0, skipped=skipped, mark=self._part.after)
            self._part = None
            return
        part = self.windows.take(self.lane, self.place.epoch, self.place.window)
        if part is None:
            self.place = self.place._replace(epoch=self.place.epoch + 1, window=0, at=0, mark=None)
            return
        self._part, self._documents = part, [row for row in part.rows if not isinstance(row, Bad)]
        self._ids, self._first = [], self.place.at
        if self._report is not None:
            for row in part.rows:
                if isinstance(row, Bad):
                    self._report(self.name, row)

    def _encode(self) -> None:
        """Tokenize the block of documents that begins with the one at hand."""
        self._first = end = self.place.at
        size = 0
        while end < len(self._documents) and size < BLOCK:
            size, end = size + len(self._documents[end]), end + 1
        self._ids = encode(self.encoder, self._documents[self._first : end], self.name)


def encode(encoder: Encoder, documents: Sequence[Document], name: str) -> list[np.ndarray]:
    """Ids of each document, int32 (length,), the EOS last; one that is ids already may bring its own.

    Raises UserError if ids that the tokenizer does not have are among those.
    """
    made = iter(encoder.encode_batch([document for document in documents if isinstance(document, str)]))
    eos, found = np.int32(encoder.eos_id), []
    for document in documents:
        ids = next(made) if isinstance(document, str) else document
        if not isinstance(document, str) and ids.max() >= encoder.vocab_size:
            raise UserError(
                f"source {name}: it holds token id {ids.max()}, but the tokenizer ends at {encoder.vocab_size - 1}; "
                "give --model.tokenizer_path the one it was made with"
            )
        ended = not isinstance(document, str) and ids[-1] == eos
        found.append(ids if ended else np.append(ids, eos))
    return found


class Lane:
    """Rows of seq_len + 1 tokens cut from the concatenated documents of the mixture; state: where to begin.

    A source that is through is left out, and the shares of the others grow by the same factor.
    """

    def __init__(self, cursors: Sequence[Cursor], shares: Sequence[float], seq_len: int, state: LaneState) -> None:
        self._cursors, self._asked, self._seq_len = cursors, shares, seq_len
        self._open, self._offset, self._credits = state.open, state.offset, state.credits
        if self._open >= 0 and cursors[self._open].through:  # a restart with fewer epochs than there were
            self._open = -1
        self._share()

    def row(self) -> tuple[np.ndarray, list[int], list[int]] | None:
        """The next row, int32 (seq_len + 1,), the indices in it at which a document begins, and its pieces' sources.

        None when the sources are through before a row is full; the state is then that of no row.
        """
        need = self._seq_len + 1
        row, fill, starts, sources = np.empty(need, np.int32), 0, [], []
        while fill < need:
            if self._open < 0:
                if not any(self._shares):
                    return None
                self._open, self._offset = mixture.pick(self._credits, self._shares), 0
                if self._cursors[self._open].document() is None:
                    self._open = -1
                    self._share()
                    continue
                starts.append(fill)
            cursor = self._cursors[self._open]
            ids = cursor.document()
            assert ids is not None, "a source with an open document is not through"
            if self._offset >= len(ids):
                raise UserError(f"source {cursor.name}: not the text or the tokenizer the checkpoint was made with")
            n = min(need - fill, len(ids) - self._offset)
            row[fill : fill + n] = ids[self._offset : self._offset + n]
            fill, self._offset = fill + n, self._offset + n
            sources.append(self._open)
            cursor.spend(n)
            if self._offset == len(ids):
                cursor.close()
                self._credits = mixture.charge(self._credits, self._shares, self._open, len(ids))
                self._open = -1
        return row, starts, sources

    def _share(self) -> None:
        left = [0.0 if cursor.through else share for cursor, share in zip(self._cursors, self._asked, strict=True)]
        self._shares = mixture.normalize(left) if any(left) else tuple(left)

    def state(self) -> LaneState:
        """The state behind the last row: a copy of a few counters."""
        offset = self._offset if self._open >= 0 else 0
        return LaneState(self._open, offset, self._credits, tuple(cursor.state() for cursor in self._cursors))


def dump_state(state: LaneState, names: Sequence[str]) -> str:
    """A lane's state as JSON, its sources under their names."""
    sources: Mapping[str, list] = {
        name: [credit, *(place if place.mark is not None else place[:-1])]
        for name, credit, place in zip(names, state.credits, state.places, strict=True)
    }
    opened = names[state.open] if state.open >= 0 else None
    return json.dumps({"open": opened, "offset": state.offset, "sources": sources}, separators=(",", ":"))


def parse_state(text: str, names: Sequence[str], fresh: LaneState) -> LaneState:
    """The state in such JSON for the sources of today; fresh: a new lane's state, from which unknown sources start.

    Sources that are gone are dropped; if the open document was of one of them, it is abandoned.
    """
    saved = json.loads(text)
    known = saved["sources"]
    opened = names.index(saved["open"]) if saved["open"] in names else -1
    credits, places = list(fresh.credits), list(fresh.places)
    for i, name in enumerate(names):
        if name in known:
            credits[i], places[i] = known[name][0], Place(*known[name][1:])
    return LaneState(opened, saved["offset"] if opened >= 0 else 0, tuple(credits), tuple(places))
