"""Text to ids: any Hugging Face tokenizer with a Rust backend, or the embedded byte-level one."""

import copy
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers.models import BPE
from torchtitan.components.tokenizer import BaseTokenizer

from flame.config.files import read_json
from flame.config.hub import check_available
from flame.config.schema import JobConfig
from flame.data.fast import covers_all_text, is_failure, open_fast
from flame.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FLAG = "--model.tokenizer_path"
END = "<|endoftext|>"
# What a tokenizer.json that comes without its tokenizer_config.json may call its end of text.
KNOWN_ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>")
PLAIN = "Any text: 0123456789, \u00e9, \u65e5\u672c\u8a9e, \U0001f642."

logger = logging.getLogger("flame")


class Tokenizer(BaseTokenizer):
    """A Hugging Face tokenizer under torchtitan's interface; `hf` is the tokenizer itself.

    Ids are those of `hf` without special tokens; the loader puts `prefix` before a document and the EOS after it. Those
    of `add_tokens` that `hf` lacks are given new ids; `added` counts the ids that they need above all others.
    Raises UserError if the tokenizer has no Rust backend or no EOS, if two tokens share an id, if a token to add is the
    spelling of other text, or if the ids of a text are random.
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
            hf.add_special_tokens({"eos_token": known[0]})  # as it is when it is read again
        self.hf, self.path = hf, path
        _check_new_tokens(hf, add_tokens, path)
        before = _count_ids(hf)
        special: dict[str, Any] = {"extra_special_tokens": list(add_tokens)}
        hf.add_special_tokens(special, replace_extra_special_tokens=False)
        self.vocab_size = _count_ids(hf)
        """The largest id and one more, added tokens included."""
        self.added = self.vocab_size - before
        self.eos_id: int = hf.eos_token_id
        self.bos_id: int | None = hf.bos_token_id
        self.prefix: tuple[int, ...] = ()
        _check_ids(hf, path)
        # A copy of our own: a call of `hf` with truncation or padding switches them on in its backend for good.
        self._backend = copy.deepcopy(hf.backend_tokenizer)
        self._backend.encode_special_tokens = hf.backend_tokenizer.encode_special_tokens  # which the copy lacks
        self._backend.no_truncation()
        self._backend.no_padding()
        if getattr(self._backend.model, "dropout", None):
            raise UserError(FLAG, f"dropout in {path}", "a tokenizer without: the ids of a text would be random")
        self.puts_bos = self.bos_id is not None and self.bos_id in self._backend.encode("").ids
        self._fast = open_fast(self._backend)
        self.encodes_all = self._try_plain_text()

    @property
    def engine(self) -> str:
        """What makes the ids, "fastokens" or "tokenizers"."""
        return "fastokens" if self._fast else "tokenizers"

    def use(self, engine: str) -> None:
        """Have an engine make the ids; logs if it is another than so far."""
        if engine == self.engine:
            return
        if engine == "tokenizers":
            logger.info("tokenizers makes the ids, as it does in this run, and not fastokens")
            self._fast = None
        else:
            logger.warning(f"tokenizers makes the ids, as {engine}, which does in this run, cannot here")

    def changed_rules(self, recorded: str) -> list[str]:
        """The parts of a tokenizer.json, given its text, by which text has other ids than here."""
        try:
            before = json.loads(type(self._backend).from_str(recorded).to_str())  # with the fields of this version
        except Exception:  # the backend's, for what is no tokenizer
            return []
        today = json.loads(self._backend.to_str())
        return [part for part in ("normalizer", "pre_tokenizer", "model") if today[part] != before[part]]

    def get_vocab_size(self) -> int:
        """torchtitan's name for vocab_size."""
        return self.vocab_size

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 (length,), without special tokens; parallel in Rust, the GIL released.

        Raises UserError for a text that the tokenizer cannot encode.
        """
        try:
            if self._fast:
                return self._fast(texts)
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, np.int32) for encoding in encodings]
        except BaseException as error:
            if isinstance(error, UserError) or not is_failure(error):
                raise
            if len(texts) > 1:  # one of them
                return [ids for text in texts for ids in self.encode_batch([text])]
            found = f"no ids of {self.path} for the text {texts[0][:60]!r}"
            raise UserError(FLAG, found, "a tokenizer of any text", str(error)) from error

    def _try_plain_text(self) -> bool:
        """Whether the tokenizer can encode any text; logs what it does with the rest if it cannot."""
        try:
            self.encode(PLAIN)
        except UserError as error:
            logger.warning(f"{self.path} cannot encode every text, and one that it cannot ends the run: {error.hint}")
            return False
        model = self._backend.model
        if isinstance(model, BPE) and model.unk_token is None and not covers_all_text(self._backend):
            logger.warning(f"{self.path} lacks tokens for some bytes or characters: it leaves them out of the text")
        return True

    def describe(self) -> str:
        """A line for the log: the number of ids, and who makes them."""
        return f"tokenizer {self.path}: {self.vocab_size:,} ids, made by {self.engine}"

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without special tokens."""
        return self.encode_batch([text])[0].tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of some ids, special tokens included."""
        return str(self.hf.decode(list(ids), clean_up_tokenization_spaces=False))


def build_tokenizer(path: str | None, trust_remote_code: bool = False, add_tokens: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of a path, "byte", a folder, a tokenizer.json or a hub id, with special tokens added.

    Raises UserError if it cannot be loaded, has no Rust backend, or as Tokenizer does.
    """
    if not path:
        raise UserError(FLAG, "nothing", '"byte", a folder, a tokenizer.json or a hub id')
    if path == "byte":
        return Tokenizer(_byte_level(), path, add_tokens)
    check_available(FLAG, path, "model")
    try:
        with without_warnings():
            hf = _load(path, trust_remote_code)
        return Tokenizer(hf, path, add_tokens)
    except BaseException as error:
        if isinstance(error, UserError) or not is_failure(error):
            raise
        raise UserError(FLAG, path, hint=f"not loadable as a tokenizer: {first_line(error)}") from error


def load_tokenizer(job_config: JobConfig) -> Tokenizer:
    """The tokenizer of a job. Raises UserError as build_tokenizer does, and for --data.add_bos without a BOS."""
    model = job_config.model
    tokenizer = build_tokenizer(model.tokenizer_path, model.trust_remote_code, model.add_tokens)
    if job_config.data.add_bos:
        if tokenizer.bos_id is None:
            raise UserError("--data.add_bos", "true", "false", f"{tokenizer.path} has no BOS token")
        tokenizer.prefix = (tokenizer.bos_id,)
    elif tokenizer.puts_bos:
        bos = tokenizer.hf.bos_token
        logger.info(f"{tokenizer.path} puts {bos} before a text; documents are trained on without it (--data.add_bos)")
    return tokenizer


@contextmanager
def without_warnings() -> Iterator[None]:
    """A block in which transformers warns of nothing, such as of model types that flame adds to those it has."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _load(path: str, trust_remote_code: bool) -> Any:
    """The tokenizer as its tokenizer.json says, if it has one and is not made by trusted code of its own.

    AutoTokenizer would take the class of the folder's model, and many classes replace the normalizer and the
    pre-tokenizer of the file by their own.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    from transformers.utils import cached_file

    local = Path(path).expanduser()
    if local.is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(local))
    found = str(local) if local.exists() else path
    names = local / "tokenizer_config.json"
    try:
        if names.exists():
            read_json(names)
    except (OSError, ValueError) as error:
        raise UserError(FLAG, f"{names}, which is damaged", "a JSON object", first_line(error)) from None
    find = partial(cached_file, found, _raise_exceptions_for_missing_entries=False)
    if trust_remote_code and "auto_map" in get_tokenizer_config(found):
        return AutoTokenizer.from_pretrained(found, trust_remote_code=trust_remote_code)
    if find("tokenizer.json") is None:
        reason = ""
        try:
            hf: Any = AutoTokenizer.from_pretrained(found, trust_remote_code=trust_remote_code)
            if not hf.is_fast or any(map(find, hf.vocab_files_names.values())):  # else it has special tokens alone
                return hf
        except ValueError:  # of transformers: it has none of the files that it could be made from
            pass
        except Exception as error:  # whatever the class raises about the files that it has instead
            reason = first_line(error)
        raise UserError(FLAG, f"no tokenizer.json in {path}", "a tokenizer with one", reason)
    hf = PreTrainedTokenizerFast.from_pretrained(found)
    json.dumps(hf.init_kwargs, default=str, ensure_ascii=False).encode()  # as it is saved: no half surrogate pair
    hf.init_kwargs.pop("auto_map", None)  # it names code, which is not run and which an export would not have
    if hf.eos_token is None:  # GPT-2's folder leaves its name to the class
        vocab = hf.get_vocab()
        with suppress(OSError, ValueError):  # a class that cannot be loaded names nothing
            # False, as transformers would else ask on the terminal whether to run code that lies there
            named = AutoTokenizer.from_pretrained(found, trust_remote_code=False).special_tokens_map
            for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
                if named.get(name) in vocab:
                    setattr(hf, name, named[name])
    return hf


def _count_ids(hf: "PreTrainedTokenizerFast") -> int:
    return max(len(hf), *(id + 1 for id in hf.get_vocab().values()))


def _check_ids(hf: "PreTrainedTokenizerFast", path: str) -> None:
    """Raises UserError if two tokens share an id, such as added ones that are numbered on from a gap."""
    vocab = hf.get_vocab()
    shared = next((id for id, count in Counter(vocab.values()).items() if count > 1), None)
    if shared is not None:
        tokens = " and ".join(repr(token) for token, id in vocab.items() if id == shared)
        raise UserError(FLAG, f"the tokens {tokens} of the same id, {shared}, in {path}", "a tokenizer of unique ids")


def _check_new_tokens(hf: "PreTrainedTokenizerFast", tokens: Sequence[str], path: str) -> None:
    """Raises UserError if a token is how other text is spelled: byte-level tokenizers write byte 0xE9 as \u00e9."""
    vocab = hf.get_vocab()
    for token in tokens:
        if token in vocab and (text := hf.decode([vocab[token]], clean_up_tokenization_spaces=False)) != token:
            hint = f"{path} writes {text!r} so, whose id it would take"
            raise UserError("--model.add_tokens", repr(token), "a token of another spelling", hint)


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
