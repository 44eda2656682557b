"""Text to ids: any Hugging Face tokenizer with a Rust backend, or the embedded byte-level one.

Where fastokens reads a tokenizer, it makes the ids in its place: the same ids, tens of times as fast.
"""

import copy
import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torchtitan.components.tokenizer import BaseTokenizer

from flame.config.paths import check_path
from flame.config.schema import Model
from flame.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FLAG = "--model.tokenizer_path"
END = "<|endoftext|>"
# What a tokenizer.json that comes without its tokenizer_config.json may call its end of text.
KNOWN_ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>")
TEXTS, PIECES = 256, 24  # of which open_fast compares the ids
# Where one tokenizer's text may differ from another's: ASCII, controls, Latin, combining marks, scripts from left and
# right, signs, ideographs, syllables, private use, forms, emoji, everything above.
RANGES = (
    *((0x20, 0x7F), (0x00, 0x20), (0x80, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0xA00)),
    *((0x1100, 0x1200), (0x2000, 0x2070), (0x20A0, 0x2C00), (0x3000, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4)),
    *((0xE000, 0xE100), (0xFB00, 0xFFFF), (0x1F300, 0x1FB00), (0x10000, 0x10FFFF)),
)
SPACES = (" ", "  ", "\n", "\r\n", "\t", " \n", "\u00a0", "\u3000")

logger = logging.getLogger("flame")


class Tokenizer(BaseTokenizer):
    """A Hugging Face tokenizer under torchtitan's interface; `hf` is the tokenizer itself.

    Ids are those of `hf` without special tokens; the loader adds the EOS between documents. Those of `add_tokens` that
    `hf` lacks are given ids after all others; `added` counts them.
    Raises UserError if the tokenizer has no Rust backend or no EOS.
    """

    def __init__(self, hf: "PreTrainedTokenizerFast", path: str, add_tokens: Sequence[str] = ()) -> None:
        super().__init__()
        if not getattr(hf, "is_fast", False):
            raise UserError(FLAG, f"{type(hf).__name__} in {path}", "a tokenizer with a tokenizer.json (Rust backend)")
        if hf.eos_token_id is None:
            known = [token for token in KNOWN_ENDS if token in hf.get_vocab()]
            if not known:
                hint = "it separates documents; set it in tokenizer_config.json"
                raise UserError(FLAG, f"no EOS token in {path}", "a tokenizer with one", hint)
            hf.eos_token = known[0]
        self.hf = hf
        special: dict[str, Any] = {"extra_special_tokens": list(add_tokens)}
        self.added: int = hf.add_special_tokens(special, replace_extra_special_tokens=False)
        self.eos_id: int = hf.eos_token_id
        self.bos_id: int | None = hf.bos_token_id
        # A copy of our own: a call of `hf` with truncation or padding switches them on in its backend for good.
        self._backend = copy.deepcopy(hf.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._fast = open_fast(self._backend)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return len(self.hf)

    def get_vocab_size(self) -> int:
        """torchtitan's name for vocab_size."""
        return self.vocab_size

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 (length,), without special tokens; parallel in Rust, the GIL released."""
        if self._fast:
            return self._fast(texts)
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without special tokens."""
        return self.encode_batch([text])[0].tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of some ids, special tokens included."""
        return str(self.hf.decode(list(ids), clean_up_tokenization_spaces=False))


def build_tokenizer(path: str | None, trust_remote_code: bool = False, add_tokens: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of a path, "byte", a folder, a tokenizer.json or a hub id, with special tokens added.

    Raises UserError if it cannot be loaded, has no Rust backend, or has no EOS.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not path:
        raise UserError(FLAG, "nothing", '"byte", a folder, a tokenizer.json or a hub id')
    if path == "byte":
        return Tokenizer(_byte_level(), path, add_tokens)
    check_path(FLAG, path)
    local = Path(path).expanduser()
    hf: Any
    try:
        if local.is_file():
            hf = PreTrainedTokenizerFast(tokenizer_file=str(local))
        else:
            found = str(local) if local.exists() else path
            hf = AutoTokenizer.from_pretrained(found, use_fast=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # the backend raises bare Exception for a file it cannot read
        reason = " ".join(str(error).split())[:200]
        raise UserError(FLAG, path, hint=f"not loadable as a tokenizer: {reason}") from error
    return Tokenizer(hf, path, add_tokens)


def load_tokenizer(model: Model) -> Tokenizer:
    """The tokenizer of a job. Raises UserError as build_tokenizer does."""
    return build_tokenizer(model.tokenizer_path, model.trust_remote_code, model.add_tokens)


def _byte_level() -> "PreTrainedTokenizerFast":
    """256 ids, each the value of a byte of the text's UTF-8, and the end of text, 256."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    # ByteLevel writes a printable Latin-1 byte as its own character and the others as characters from U+0100 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte if byte in printable else 256 + others.index(byte)): byte for byte in range(256)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, clean_up_tokenization_spaces=False)


def open_fast(backend: Any) -> Callable[[Sequence[str]], list[np.ndarray]] | None:
    """fastokens for encode_batch_fast of a `tokenizers.Tokenizer`: ids of texts, int32 (length,), none special.

    None if fastokens is not installed, cannot read this tokenizer, or gives other ids for any of some hundred texts of
    its own tokens and of characters of every kind.
    """
    os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")  # its threads would spin beside the training's
    try:
        from fastokens import Tokenizer as FastTokenizer
    except ImportError:
        return None
    try:
        fast = FastTokenizer.from_json_str(backend.to_str())
    except ValueError as error:
        logger.info(f"tokenizers makes the ids, as fastokens does not read this one: {error}")
        return None

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        ids, offsets = fast.encode_batch_flat(list(texts))
        flat, ends = np.frombuffer(ids, np.int32), np.frombuffer(offsets, np.int64).tolist()
        return [flat[begin:end] for begin, end in pairwise(ends)]

    texts = list(_sample_texts(backend))
    expected = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    if [ids.tolist() for ids in encode(texts)] != expected:
        logger.warning("tokenizers makes the ids, as fastokens gives others for some texts")
        return None
    return encode


def _sample_texts(backend: Any) -> Iterator[str]:
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
