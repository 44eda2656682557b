"""`python -m flame.data pack`: sources tokenized once, in their own order, into Megatron's .bin and .idx."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from flame.data.cursor import encode
from flame.data.document import Bad, Document, allow_bad
from flame.data.loader import NOTED
from flame.data.megatron import write
from flame.data.source import Source
from flame.data.tokenize import Tokenizer
from flame.errors import UserError

BLOCK = 1024  # rows tokenized together


def pack_sources(out: Path, sources: Sequence[Source], tokenizer: Tokenizer, max_bad_rows: float) -> tuple[int, int]:
    """Write every document of the sources, the EOS last; returns (documents, tokens).

    Bad rows are skipped, the first of each source named on stderr. Raises UserError at more than max_bad_rows
    (see flame.data.document.allow_bad) in a source, and if there is no document at all.
    """
    return write(out, _encoded(sources, tokenizer, max_bad_rows), tokenizer.vocab_size)


def _encoded(sources: Sequence[Source], tokenizer: Tokenizer, max_bad_rows: float) -> Iterator[np.ndarray]:
    for source in sources:
        read = bad = 0
        for rows in _blocks(source):
            for row in rows:
                if isinstance(row, Bad):
                    bad += 1
                    if bad <= NOTED:
                        print(f"source {source.name}: {row.place} is skipped: {row.reason}", file=sys.stderr)
            read += len(rows)
            if bad > allow_bad(max_bad_rows, read):
                raise UserError(
                    f"--max-bad-rows: found {bad} bad rows among {read} of source {source.name}, "
                    f"must be at most {allow_bad(max_bad_rows, read):g} (set to {max_bad_rows:g})"
                )
            yield from encode(tokenizer, [row for row in rows if not isinstance(row, Bad)], source.name)


def _blocks(source: Source) -> Iterator[list[Document | Bad]]:
    if source.streamed:
        yield from (rows for rows, _ in source.rows.batches(BLOCK))
        return
    for first in range(0, len(source.rows), BLOCK):
        yield source.rows.texts(list(range(first, min(first + BLOCK, len(source.rows)))))
