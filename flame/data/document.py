"""What a row holds: a document's text or its token ids; or nothing to train on, with the reason and the place."""

from dataclasses import dataclass
from typing import Any

import numpy as np

LONGEST = 1 << 25  # characters or ids; longer ones are dumps rather than documents, and cost memory by the gigabyte
NAMED = 5  # bad rows per source that are named, on each rank
LARGEST = np.iinfo(np.int32).max  # id
NO_IDS = "numbers that are not token ids"
ALWAYS_ALLOWED = 100  # bad rows of a source, however short it is, where the limit is a share

TEXT, IDS, NOTHING = "text", "token ids", "nothing"  # what a column may hold, in the words of errors

Document = str | np.ndarray


@dataclass(frozen=True)
class Bad:
    """A row that is skipped. place: "file:line", or "row N", counted from 0."""

    reason: str
    place: str


def accept(value: Any, place: str) -> Document | Bad:
    """The document in a row's value, text or its UTF-8, or token ids as int32 (length,); or why it holds none."""
    if value is None:
        return Bad("null", place)
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return Bad("invalid UTF-8", place)
    if isinstance(value, list):
        if not all(type(item) is int for item in value):
            return Bad("a list of something else than token ids", place)
        if not all(0 <= item <= LARGEST for item in value):  # also those beyond 64 bits
            return Bad(NO_IDS, place)
        value = np.array(value, np.int32)
    if not isinstance(value, str | np.ndarray):
        return Bad(f"{type(value).__name__}, not text", place)
    if len(value) == 0:
        return Bad("empty", place)
    if len(value) > LONGEST:
        return Bad(f"{len(value):,} {'characters' if isinstance(value, str) else 'ids'}, at most {LONGEST:,}", place)
    if isinstance(value, str):
        return value
    if value.dtype.kind not in "iu" or value.min() < 0 or value.max() > LARGEST:
        return Bad(NO_IDS, place)
    return value.astype(np.int32, copy=False)


def describe(value: Any) -> str:
    """What a JSON value is, in the words of errors about columns."""
    if value is None or value == []:
        return NOTHING
    if isinstance(value, list):
        return IDS if all(type(item) is int for item in value) else f"lists of {describe(value[0])}"
    words = {str: TEXT, dict: "objects", bool: "true or false", int: "numbers", float: "numbers"}
    return words.get(type(value), type(value).__name__)


def allow_bad(limit: float, read: int) -> float:
    """How many of so many rows may be bad; limit: --data.max_bad_rows, a number of rows or, below 1, their share."""
    return max(ALWAYS_ALLOWED, limit * read) if 0 < limit < 1 else limit
