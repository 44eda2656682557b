"""The tokenizer of an export: AutoTokenizer has to give the ids of its tokenizer.json, those that were trained on."""

import json
from pathlib import Path
from typing import Any

from flame.checkpoint.structure import ConversionError
from flame.data.fast import sample_texts


def settle_tokenizer(folder: Path) -> None:
    """Have AutoTokenizer take the rules of an export's tokenizer.json.

    For some models transformers 5 (models/auto/tokenization_auto.py: Qwen2, Qwen3.5) ignores the tokenizer_class of an
    export for one whose constructor has a normalizer and a pre-tokenizer of its own. It keeps those of the file if
    tokenizer_config.json has "trust_remote_code", which runs no code: there is none.
    """
    path = folder / "tokenizer_config.json"
    try:
        hf: Any = _load(folder)
        same = hf.backend_tokenizer.to_str() == _read_rules(folder).to_str()
    except Exception:  # `compare_tokenizer` reports it
        return
    if not same:
        names = json.loads(path.read_text(encoding="utf-8"))
        unset = dict.fromkeys(hf.SPECIAL_TOKENS_ATTRIBUTES)  # or the class adds tokens of its own
        text = json.dumps({**unset, **names, "trust_remote_code": True}, indent=2, sort_keys=True, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def compare_tokenizer(folder: Path) -> dict[str, int] | str:
    """AutoTokenizer against an export's tokenizer.json, with and without special tokens, on some hundred texts.

    Returns how much was compared, or why nothing was. Raises ConversionError if any id differs or the file
    is damaged.
    """
    if not (folder / "tokenizer.json").is_file():
        return "not compared: there is no tokenizer.json"
    try:
        rules = _read_rules(folder)
    except Exception as error:  # of the Rust code, for a file that is damaged
        raise ConversionError(f"{folder}: its tokenizer.json is not that of a tokenizer ({error})") from None
    try:
        hf: Any = _load(folder)
    except Exception as error:  # whatever a tokenizer's class raises
        return f"not compared: {error}"
    rules.encode_special_tokens = hf.split_special_tokens
    texts, count = [_encodable(rules, text) for text in sample_texts(rules)], 0
    for special in (False, True):
        expected = [encoding.ids for encoding in rules.encode_batch_fast(texts, add_special_tokens=special)]
        try:
            given = hf(texts, add_special_tokens=special).input_ids
        except TypeError as error:  # of a value in tokenizer_config.json
            return f"not compared: {error}"
        for text, ids, found in zip(texts, expected, given, strict=True):
            if found != ids:
                raise ConversionError(f"{folder}: AutoTokenizer gives other ids than were trained on for {text!r}")
            count += len(ids)
    return {"texts": len(texts), "ids": count, "differences": 0}


def _encodable(rules: Any, text: str) -> str:
    """The characters of a text that a tokenizer has ids for: without an unknown token, not all have them for any."""
    if _encodes(rules, text):
        return text
    part = "".join(character for character in text if _encodes(rules, character))
    return part if _encodes(rules, part) else ""


def _encodes(rules: Any, text: str) -> bool:
    try:
        rules.encode(text)
    except Exception:  # of the Rust code
        return False
    return True


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    from flame.data.tokenize import without_warnings  # here: it imports torchtitan, before which the device is chosen

    with without_warnings():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _read_rules(folder: Path) -> Any:
    from tokenizers import Tokenizer

    rules = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rules.no_truncation()
    rules.no_padding()
    return rules
