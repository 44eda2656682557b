"""fastokens in the place of tokenizers: the same ids tens of times as fast, for the tokenizers it reads."""

import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

PROBES, PIECES = 256, 24
# Where one tokenizer's text may differ from another's: ASCII, controls, Latin, combining marks, scripts from left and
# right, signs, ideographs, syllables, private use, forms, emoji, everything above.
RANGES = (
    *((0x20, 0x7F), (0x00, 0x20), (0x80, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0xA00)),
    *((0x1100, 0x1200), (0x2000, 0x2070), (0x20A0, 0x2C00), (0x3000, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4)),
    *((0xE000, 0xE100), (0xFB00, 0xFFFF), (0x1F300, 0x1FB00), (0x10000, 0x10FFFF)),
)
SPACES = (" ", "  ", "\n", "\r\n", "\t", " \n", "\u00a0", "\u3000")

Encode = Callable[[Sequence[str]], list[np.ndarray]]


def open_fast(backend: Any) -> Encode | None:
    """The same as encode_batch_fast of a `tokenizers.Tokenizer`, without special tokens: ids of texts, int32 (length,).

    None if fastokens is not installed, cannot read this tokenizer, or gives other ids for any of some hundred texts of
    its own tokens and of characters of every kind.
    """
    os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")  # its threads would spin beside the training's
    try:
        from fastokens import Tokenizer
    except ImportError:
        return None
    try:
        fast = Tokenizer.from_json_str(backend.to_str())
    except ValueError as error:
        logging.getLogger(__name__).info(f"tokenizers makes the ids, as fastokens does not read this one: {error}")
        return None

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        ids, offsets = fast.encode_batch_flat(list(texts))
        flat, ends = np.frombuffer(ids, np.int32), np.frombuffer(offsets, np.int64).tolist()
        return [flat[begin:end] for begin, end in pairwise(ends)]

    texts = list(_probe(backend))
    right = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    if [ids.tolist() for ids in encode(texts)] != right:
        logging.getLogger(__name__).warning("tokenizers makes the ids, as fastokens gives others for some texts")
        return None
    return encode


def _probe(backend: Any) -> Iterator[str]:
    """Texts of tokens, spaces, numbers and characters of one range each, the same at every call."""
    rng, size = random.Random(0), backend.get_vocab_size()
    makers = (
        lambda: backend.decode([rng.randrange(size) for _ in range(4)], skip_special_tokens=False),
        lambda: rng.choice(SPACES) * rng.randrange(1, 5),
        lambda: str(rng.randrange(10 ** rng.randrange(1, 12))),
        lambda: "".join(map(chr, rng.choices(range(*rng.choice(RANGES)), k=rng.randrange(1, 8)))),
    )
    for _ in range(PROBES):
        yield "".join(rng.choice(makers)() for _ in range(PIECES))
