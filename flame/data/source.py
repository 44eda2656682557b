"""Sources: named sets of rows and their weights in the mixture, opened by flame.data.table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flame.config.schema import Data, Training, Validation
from flame.data.document import Bad, Document
from flame.data.files import LibraryFiles
from flame.data.settings import parse_sources, spelled_by_the_user
from flame.data.table import open_table
from flame.data.window import Stream
from flame.errors import UserError


@dataclass(frozen=True)
class Source:
    """A named set of rows and its weight in the mixture, in tokens."""

    name: str
    weight: float
    rows: Any  # Rows or Stream

    @property
    def streamed(self) -> bool:
        """Whether the rows come in one order only."""
        return isinstance(self.rows, Stream)

    def sample(self, count: int) -> Sequence[Document | Bad]:
        """Up to so many rows: spread over the source, or a stream's first."""
        if self.streamed:
            return next(self.rows.batches(count), ([], None))[0]
        step = max(1, len(self.rows) // count)
        return self.rows.texts(list(range(0, len(self.rows), step))[:count])

    def blocks(self, size: int) -> Iterator[list[Document | Bad]]:
        """All rows in their own order, up to so many at a time."""
        if self.streamed:
            yield from (rows for rows, _ in self.rows.batches(size))
            return
        for first in range(0, len(self.rows), size):
            yield self.rows.texts(list(range(first, min(first + size, len(self.rows)))))


def build_sources(section: Training | Validation, data: Data, streaming: bool | None = None) -> list[Source]:
    """Open the sources of a section.

    streaming: read hub sources over the network; default training.streaming. Raises UserError for settings that are
    wrong, and for data that cannot be read.
    """
    sources: list[Source] = []
    if streaming is None:
        streaming = isinstance(section, Training) and section.streaming
    for index, source in enumerate(parse_sources(section, data)):
        assert source.name
        with spelled_by_the_user(section, data, index):
            rows = LibraryFiles() if source.path == "stdlib" else open_table(source, streaming)
            opened = Source(source.name, source.weight, rows)
            if not opened.streamed and len(opened.rows) == 0:
                raise UserError("path", f"no rows in {source.path}")
        sources.append(opened)
    return sources
