"""Text to ids: any Hugging Face tokenizer with a Rust backend, or the embedded byte-level one."""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torchtitan.components.tokenizer import BaseTokenizer

from flame.config.paths import is_local
from flame.data.fast import open_fast
from flame.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FLAG = "--model.tokenizer_path"
ALLOWED = 'allowed: "byte", a folder, a tokenizer.json file, or a hub id'
END = "<|endoftext|>"
# What a tokenizer.json that comes without its tokenizer_config.json may call its end of text.
KNOWN_ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>")


class Tokenizer(BaseTokenizer):
    """A Hugging Face tokenizer behind torchtitan's interface; `hf` is the tokenizer itself.

    Ids are those of `hf` without special tokens; the packer adds the EOS between documents. `add_tokens` are given an
    id each behind all others, unless they have one; `added` counts those that had none.
    Raises UserError if the tokenizer has no Rust backend or no EOS.
    """

    def __init__(self, hf: "PreTrainedTokenizerFast", path: str, add_tokens: Sequence[str] = ()) -> None:
        super().__init__()
        if not getattr(hf, "is_fast", False):
            raise UserError(f"{FLAG} {path}: {type(hf).__name__} has no Rust backend; a tokenizer.json is needed")
        if hf.eos_token_id is None:
            known = [token for token in KNOWN_ENDS if token in hf.get_vocab()]
            if not known:
                raise UserError(f"{FLAG} {path}: no EOS token to separate documents; set one in tokenizer_config.json")
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

    Raises UserError if it cannot be loaded, is not a fast one, or has no EOS.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not path:
        raise UserError(f"{FLAG} is empty; {ALLOWED}")
    if path == "byte":
        return Tokenizer(_byte_level(), path, add_tokens)
    local = Path(path).expanduser()
    if not local.exists() and is_local(path):
        raise UserError(f"{FLAG} {path}: no such file or folder; {ALLOWED}")
    hf: Any
    try:
        if local.is_file():
            hf = PreTrainedTokenizerFast(tokenizer_file=str(local))
        else:
            found = str(local) if local.exists() else path
            hf = AutoTokenizer.from_pretrained(found, use_fast=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # the backend raises bare Exception for a file it cannot read
        raise UserError(f"{FLAG} {path}: not loadable as a tokenizer ({' '.join(str(error).split())[:200]})") from error
    return Tokenizer(hf, path, add_tokens)


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
