"""A cursor: where one lane is in one source. It reads and tokenizes a block of documents at a time."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from flame.data.document import Bad, Document
from flame.data.window import IndexedWindows, Place, StreamedWindows, WindowSlice
from flame.errors import UserError

BLOCK = 1 << 16  # characters tokenized in one call, at least: enough for Rust's threads, soon enough for the first step
GROUP = 8  # rows read in one call, however large a window is: few texts are held, and files are seldom opened
MAX_EMPTY_WINDOWS = 100  # per lane: a source in which a lane finds no text in so many windows in a row is given up


class Encoder(Protocol):
    """What a lane needs of a tokenizer."""

    eos_id: int
    prefix: Sequence[int]  # of a document
    vocab_size: int
    engine: str  # what makes the ids

    def use(self, engine: str) -> None: ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...


class Cursor:
    """Reads one source for one lane: the token ids of one document after the other, window by window."""

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
        self._slice: WindowSlice | None = None
        self._rows = self._bad = 0  # of the slice, that were read
        self._last: Bad | None = None
        self._pass_over = 0  # documents of the slice before the current one, still to be read
        self._texts: deque[Document] = deque()  # documents that were read and not tokenized yet
        self._ids: deque[np.ndarray] = deque()  # of the documents before those, the current one first

    @property
    def exhausted(self) -> bool:
        """Whether the source was read as many times as asked for."""
        return 0 < self._epochs <= self.place.epoch

    def document(self) -> np.ndarray | None:
        """Ids of the current document, int32 (length,), as `encode` makes them; None when the source is exhausted.

        Raises UserError if the source holds no document, or ids that the tokenizer does not have.
        """
        windows = 0
        while not self._ids or len(self._ids[0]) == 0:
            if self._ids:
                self._ids.popleft()
                self.place = self.place._replace(at=self.place.at + 1, skipped=self.place.skipped + 1)
            elif self._slice is None:
                if self.exhausted:
                    return None
                if windows == MAX_EMPTY_WINDOWS * self.windows.shuffle.lanes:
                    found = f"no document in {windows} windows in a row of lane {self.lane}"
                    hint = f"the last row is {self._last.place}: {self._last.reason}" if self._last else ""
                    raise UserError(f"source {self.name}", found, hint=hint)
                windows += 1
                self._enter_window()
            elif self._texts or self._rows < self._slice.size:
                self._encode(self._slice)
            else:
                self._leave_window(self._slice)
        return self._ids[0]

    def count_tokens(self, tokens: int) -> None:
        """Count tokens that were handed out."""
        self.place = self.place._replace(tokens=self.place.tokens + tokens)

    def advance(self) -> None:
        """Go on to the next document."""
        assert self._slice is not None, "a document is open"
        self._ids.popleft()
        self.place = self.place._replace(at=self.place.at + 1, documents=self.place.documents + 1)
        if not self._ids and not self._texts and self._rows == self._slice.size:
            self._leave_window(self._slice)

    def _enter_window(self) -> None:
        """Open the current window, or begin another epoch after the last."""
        self._slice = self.windows.take(self.lane, self.place.epoch, self.place.window)
        self._rows, self._bad, self._pass_over = 0, 0, self.place.at
        if self._slice is None:
            self.place = self.place._replace(epoch=self.place.epoch + 1, window=0, at=0, mark=None)

    def _leave_window(self, rows: WindowSlice) -> None:
        skipped = self.place.skipped + self._bad
        self.place = self.place._replace(window=self.place.window + 1, at=0, skipped=skipped, mark=rows.after)
        self._slice = None

    def _encode(self, rows: WindowSlice) -> None:
        """Tokenize the slice's next block of documents."""
        block: list[Document] = []
        size = 0
        while size < BLOCK and (self._texts or self._rows < rows.size):
            if not self._texts:
                self._read(rows)
                continue
            block.append(self._texts.popleft())
            size += len(block[-1])
        encoded = encode(self.encoder, block, self.name)
        self._ids.extend(encoded)
        for document, ids in zip(block, encoded, strict=True):
            if len(ids) == 0:
                self._note(without_tokens(document))

    def _read(self, rows: WindowSlice) -> None:
        """Read the slice's next rows, and keep the documents among them from the current one on."""
        for row in rows.read(slice(self._rows, self._rows + GROUP)):
            self._rows += 1
            if isinstance(row, Bad):
                self._bad += 1
                self._note(row)
            elif self._pass_over:
                self._pass_over -= 1
            else:
                self._texts.append(row)

    def _note(self, row: Bad) -> None:
        self._last = row
        if self._report is not None:
            self._report(self.name, row)


def encode(encoder: Encoder, documents: Sequence[Document], name: str) -> list[np.ndarray]:
    """Ids of each document between the encoder's prefix and the EOS, int32 (length,); of length 0 if it has no tokens.

    A document of ids may have both already. Raises UserError for ids that the tokenizer does not have.
    """
    encoded = iter(encoder.encode_batch([document for document in documents if isinstance(document, str)]))
    prefix, eos, result = np.array(encoder.prefix, np.int32), np.array([encoder.eos_id], np.int32), []
    for document in documents:
        if isinstance(document, str):
            ids = next(encoded)
        elif document.max() >= encoder.vocab_size:
            found, allowed = f"token id {document.max()}", f"below {encoder.vocab_size}, the tokenizer's number of ids"
            raise UserError(f"source {name}", found, allowed, "give --model.tokenizer_path the tokenizer of these ids")
        else:
            ids = document[:-1] if document[-1] == encoder.eos_id else document
            ids = ids[len(prefix) :] if np.array_equal(ids[: len(prefix)], prefix) else ids
        result.append(np.concatenate((prefix, ids, eos)) if len(ids) else ids)
    return result


def without_tokens(document: Document) -> Bad:
    """The bad row that such a document is."""
    return Bad("no tokens", repr(document[:40]) if isinstance(document, str) else "a bare EOS")
