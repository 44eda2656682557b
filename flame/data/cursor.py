"""A cursor: where one lane is in one source. It reads and tokenizes a block of documents at a time."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from flame.data.document import Bad, Document
from flame.data.window import IndexedWindows, Part, StreamedWindows
from flame.errors import UserError

BLOCK = 1 << 16  # characters tokenized in one call, at least: enough for Rust's threads, soon enough for the first step
GROUP = 8  # rows read in one call, however large a window is: few texts are held, and files are seldom opened
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


class Cursor:
    """Reads one source for one lane: the ids of a document after the other, out of its part of a window."""

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
        self._rows = self._documents = 0  # of the part, that were read: all, and those that are no bad rows
        self._texts: deque[Document] = deque()  # the last of them, not tokenized yet
        self._ids: list[np.ndarray] = []  # of the block, the documents before those
        self._tokens = place.tokens

    @property
    def through(self) -> bool:
        """Whether the source was read as many times as asked for."""
        return 0 < self._epochs <= self.place.epoch

    def document(self) -> np.ndarray | None:
        """Ids of the document at hand, EOS last, int32 (length,); None when the source is through."""
        barren = 0
        while self.place.at >= self._documents - len(self._texts):
            if self._part is not None and (self._texts or self._rows < self._part.size):
                self._encode()
            elif self._part is not None:
                self._leave()
            elif self.through:
                return None
            elif barren == BARREN * self.windows.deal.lanes:
                raise UserError(f"source {self.name}: no document in {barren} windows in a row of lane {self.lane}")
            else:
                barren += 1
                self._enter()
        return self._ids[self.place.at - self._documents + len(self._texts)]  # counted from the block's end

    def spend(self, tokens: int) -> None:
        """Count tokens handed out."""
        self._tokens += tokens

    def close(self) -> None:
        """Go on to the next document."""
        assert self._part is not None, "a document is open"
        self.place = self.place._replace(at=self.place.at + 1, documents=self.place.documents + 1)
        if self.place.at == self._documents and self._rows == self._part.size:
            self._leave()

    def state(self) -> Place:
        return self.place._replace(tokens=self._tokens)

    def _enter(self) -> None:
        """Open the window at hand, or begin another epoch if there is none."""
        self._part = self.windows.take(self.lane, self.place.epoch, self.place.window)
        if self._part is None:
            self.place = self.place._replace(epoch=self.place.epoch + 1, window=0, at=0, mark=None)

    def _leave(self) -> None:
        assert self._part is not None
        skipped = self.place.skipped + self._rows - self._documents
        window = self.place.window + 1
        self.place = self.place._replace(window=window, at=0, skipped=skipped, mark=self._part.after)
        self._part, self._rows, self._documents, self._ids = None, 0, 0, []

    def _encode(self) -> None:
        """Tokenize the part's next block of documents."""
        assert self._part is not None
        block: list[Document] = []
        size = 0
        while size < BLOCK and (self._texts or self._rows < self._part.size):
            if not self._texts:
                self._read(self._part)
                continue
            block.append(self._texts.popleft())
            size += len(block[-1])
        self._ids = encode(self.encoder, block, self.name)

    def _read(self, part: Part) -> None:
        """Read the part's next rows, and keep the documents among them from the one at hand on."""
        for row in part.read(self._rows, self._rows + GROUP):
            self._rows += 1
            if not isinstance(row, Bad):
                if self._documents >= self.place.at:
                    self._texts.append(row)
                self._documents += 1
            elif self._report is not None:
                self._report(self.name, row)


def encode(encoder: Encoder, documents: Sequence[Document], name: str) -> list[np.ndarray]:
    """Ids of each document, int32 (length,), the EOS last; one that is ids already may bring its own.

    Raises UserError if ids that the tokenizer does not have are among those.
    """
    made = iter(encoder.encode_batch([document for document in documents if isinstance(document, str)]))
    eos, found = np.array([encoder.eos_id], np.int32), []
    for document in documents:
        ids = next(made) if isinstance(document, str) else document
        if not isinstance(document, str) and ids.max() >= encoder.vocab_size:
            raise UserError(
                f"source {name}: it holds token id {ids.max()}, but the tokenizer ends at {encoder.vocab_size - 1}; "
                "give --model.tokenizer_path the one it was made with"
            )
        ended = not isinstance(document, str) and ids[-1] == encoder.eos_id
        found.append(ids if ended else np.concatenate((ids, eos)))
    return found
