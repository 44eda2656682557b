"""fastokens in the place of `tokenizers`: the same ids, tens of times as fast, for vocabularies that cover all text."""

import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from flame.errors import UserError

Encode = Callable[[Sequence[str]], list[np.ndarray]]
TEXTS, PIECES = 256, 24  # of which open_fast compares the ids
CHECKING, CHECKED = 0.01, 1000  # the share of the time that comparing takes later on; characters in each comparison
# Where one tokenizer's text may differ from another's: ASCII, controls, Latin, combining marks, scripts from left and
# right, signs, ideographs, syllables, private use, forms, emoji, everything above.
RANGES = (
    *((0x20, 0x7F), (0x00, 0x20), (0x80, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0xA00)),
    *((0x1100, 0x1200), (0x2000, 0x2070), (0x20A0, 0x2C00), (0x3000, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4)),
    *((0xE000, 0xE100), (0xFB00, 0xFFFF), (0x1F300, 0x1FB00), (0x10000, 0x10FFFF)),
)
NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that UTF-8 does not have; ByteLevel writes them as these characters
SPACES = (" ", "  ", "\n", "\r\n", "\t", " \n", "\u00a0", "\u3000")

logger = logging.getLogger("flame")


def is_failure(error: BaseException) -> bool:
    """Whether Rust code failed: by an Exception or by a panic, which is none."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def covers_all_text(backend: Any) -> bool:
    """Whether a `tokenizers.Tokenizer` is a byte-pair encoding that has a token for each byte that UTF-8 has.

    Where one is missing, `tokenizers` leaves it out of the text or takes the unknown token, and fastokens fails.
    """
    rules = json.loads(backend.to_str())
    if rules["model"]["type"] != "BPE":
        return False
    vocab = rules["model"]["vocab"]
    if rules["model"]["byte_fallback"]:
        return all(f"<0x{byte:02X}>" in vocab for byte in set(range(256)) - NEVER)
    steps = rules["pre_tokenizer"] or {}
    bytewise = any(step["type"] == "ByteLevel" for step in steps.get("pretokenizers", [steps]) if step)
    return bytewise and vocab.keys() >= set(pre_tokenizers.ByteLevel.alphabet()) - set(map(chr, NEVER))


def open_fast(backend: Any) -> Encode | None:
    """fastokens for encode_batch_fast of a `tokenizers.Tokenizer`: ids of texts, int32 (length,), none special.

    None if the vocabulary does not cover all text, or if fastokens is not installed, cannot read this tokenizer, or
    gives other ids for any of some hundred texts of its own tokens and of characters of every kind.
    """
    if backend.encode_special_tokens or not covers_all_text(backend):
        return None
    os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")  # its threads would spin beside the training's
    try:
        from fastokens import Tokenizer as FastTokenizer
    except ImportError:
        return None

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        ids, offsets = fast.encode_batch_flat(list(texts))
        flat, ends = np.frombuffer(ids, np.int32), np.frombuffer(offsets, np.int64).tolist()
        return [flat[begin:end] for begin, end in pairwise(ends)]

    texts = list(sample_texts(backend))
    expected = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    try:
        fast = FastTokenizer.from_json_str(backend.to_str())
        found = [ids.tolist() for ids in encode(texts)]
    except BaseException as error:
        if not is_failure(error):
            raise
        logger.info(f"tokenizers makes the ids, as fastokens does not read this one: {error}")
        return None
    if found != expected:
        logger.warning("tokenizers makes the ids, as fastokens gives others for some texts")
        return None
    return Checked(encode, backend)


class Checked:
    """The ids of `fast`; those of one short text in some hundred are compared with those of a `tokenizers.Tokenizer`.

    That takes a hundredth of the time that `fast` takes. Raises UserError for a text with other ids.
    """

    def __init__(self, fast: Encode, backend: Any) -> None:
        self._fast, self._backend, self._rng = fast, backend, random.Random(0)
        self._encoding = self._checking = 0.0  # seconds

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        begin = time.perf_counter()
        encoded = self._fast(texts)
        self._encoding += time.perf_counter() - begin
        if texts and self._checking <= CHECKING * self._encoding:
            self._check(self._rng.choice(texts))
        return encoded

    def _check(self, text: str) -> None:
        begin = time.perf_counter()
        at = self._rng.randrange(max(len(text) - CHECKED, 0) + 1)
        part = text[at : at + CHECKED]
        (found,), expected = self._fast([part]), self._backend.encode(part, add_special_tokens=False).ids
        self._checking += time.perf_counter() - begin
        if found.tolist() != expected:
            hint = "without the package fastokens, tokenizers makes them"
            raise UserError("fastokens", f"other ids than those of tokenizers for the text {part!r}", hint=hint)


def sample_texts(backend: Any) -> Iterator[str]:
    """Texts of tokens, spaces, numbers and characters of one range each, the same at every call."""
    rng, size = random.Random(0), backend.get_vocab_size()
    makers = (
        lambda: backend.decode([rng.randrange(size) for _ in range(4)], skip_special_tokens=False),
        lambda: rng.choice(SPACES) * rng.randrange(1, 5),
        lambda: str(rng.randrange(10 ** rng.randrange(1, 12))),
        lambda: "".join(map(chr, rng.choices(range(*rng.choice(RANGES)), k=rng.randrange(1, 8)))),
    )
    for _ in range(TEXTS):
        yield "".join(rng.choice(makers)() for _ in range(PIECES))
