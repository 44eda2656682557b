"""Tokenizers: folders and tokenizer.json files, checked before launch, loaded, used and saved."""

import json
import os
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torchtitan.protocols import train_spec

from flame.config.parser import parse
from flame.data import __main__ as data
from flame.data.tokenize import build_tokenizer, load_tokenizer
from flame.errors import REFUSED, UserError
from flame.preflight import __main__ as preflight
from flame.training.context import RunContext
from flame.training.train_spec import register
from tests.fuzz.mutation import BYTES, JSON, ODD, dump, spoil_bytes, spoil_json
from tests.fuzz.oracle import Area, check
from tests.tiny import write_config

TEXTS = ("plain words, 12345 of them", "é日本 \u200b\u0000", "   \n\t ", "</s><unk>[UNK] <x>", "e\u0301" * 9, "🙂🙂 a")
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")
KINDS = ("bytes", "words", "pieces", "unigram", "fallback")
CLASSES = (
    "PreTrainedTokenizerFast",
    "LlamaTokenizer",
    "Qwen2Tokenizer",
    "GPT2Tokenizer",
    "BertTokenizer",
    "T5Tokenizer",
    "x",
)
FIELDS = st.one_of(  # of tokenizer_config.json
    st.tuples(st.just("tokenizer_class"), st.sampled_from((*CLASSES, *ODD))),
    st.tuples(
        st.sampled_from(("eos_token", "bos_token", "unk_token")),
        st.sampled_from(("<new>", "a", {"content": "<n>"}, *ODD)),
    ),
    st.tuples(
        st.sampled_from(
            ("model_max_length", "add_bos_token", "added_tokens_decoder", "extra_special_tokens", "backend")
        ),
        st.sampled_from((*ODD, {"5": {"content": "a"}}, {"9999": {"content": "<far>", "special": True}})),
    ),
    st.tuples(st.just("auto_map"), st.sampled_from(({"AutoTokenizer": ["evil.T", "evil.T"]}, *ODD))),
)
MODELS = st.sampled_from((None, "qwen2", "llama", "gpt2", "bert", "t5", "x", 5))  # model_type of a config.json there
# kind, fields, model_type, what is spoiled of which file, flags, whether the path is that of tokenizer.json
CASES = st.tuples(
    st.sampled_from(KINDS),
    st.lists(FIELDS, max_size=2),
    st.one_of(st.none(), MODELS),
    st.one_of(
        st.just((0, [])),
        st.tuples(st.just(0), st.lists(JSON, min_size=1, max_size=3)),
        st.tuples(st.integers(0, 3), st.lists(JSON, min_size=1, max_size=3)),
        st.tuples(st.integers(0, 3), st.lists(BYTES, min_size=1, max_size=2)),
    ),
    st.sampled_from(([], [], ["--model.grow_vocab"], ["--model.add_tokens=<x>"], ["--model.add_tokens=a,</s>,é"])),
    st.booleans(),
)


@cache
def _tokenizer(kind):
    """The JSON of a small tokenizer."""
    characters = [*map(chr, range(0x20, 0x7F)), "é", "▁"]
    vocab = {token: i for i, token in enumerate(("<unk>", "<s>", "</s>", *characters))}
    if kind == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {token: i for i, token in enumerate((*alphabet, "wo", "rd", "word", "</s>"))}
        backend = Tokenizer(models.BPE(vocab, [("w", "o"), ("r", "d"), ("wo", "rd")]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    elif kind == "words":
        backend = Tokenizer(models.WordLevel(vocab | {"plain": 200, "words": 201}, "<unk>"))
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
    elif kind == "pieces":
        backend = Tokenizer(models.WordPiece(vocab | {"##s": 200}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
    elif kind == "unigram":
        backend = Tokenizer(models.Unigram([(token, -1.0 - i) for token, i in vocab.items()], 0, False))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
    else:
        vocab |= {f"<0x{byte:02X}>": 103 + byte for byte in range(256)}
        merges = [("a", "b")]
        backend = Tokenizer(
            models.BPE(vocab | {"ab": 359}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        )
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.post_processor = processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", backend.token_to_id("</s>"))]
    )
    return backend.to_str()


def write(case):
    kind, fields, model_type, (number, steps), _, _ = case
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **dict(fields)}
    trees = dict(zip(FILES, (json.loads(_tokenizer(kind)), config, {"eos_token": "</s>"}), strict=False))
    if model_type is not None:
        trees["config.json"] = {"model_type": model_type, "vocab_size": 320}
    folder = Path("tok")
    folder.mkdir()
    for i, (name, tree) in enumerate(trees.items()):
        here = steps if i == number % len(trees) else []
        if here and here[0][0] in ("set", "delete"):
            (folder / name).write_bytes(dump(spoil_json(tree, here)))
        else:
            (folder / name).write_bytes(spoil_bytes(dump(tree), here))
    (folder / "evil.py").write_text("open('CODE_RAN', 'w')\n")
    Path("text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    write_config(Path(), "llama", vocab_size=400)


def run(case):
    os.environ["NGPU"] = "1"
    *_, flags, alone = case
    path = "tok/tokenizer.json" if alone else "tok"
    flags = [f"--model.tokenizer_path={path}", "--model.config=llama.json", "--training.dataset=text.jsonl", *flags]
    flags += ["--training.seq_len=32", "--job.dump_folder=out/run"]
    words = ["pack", "out/packed", "--dataset", "text.jsonl", "--tokenizer", path]
    return preflight.main(flags) or _use(flags) or data.main(words)


def _use(flags):
    """Do with the tokenizer what a job does."""
    train_spec._extra_train_specs.clear()
    try:
        config = parse(flags)
        register(config, RunContext(config))
        tokenizer = load_tokenizer(config)
        ids = tokenizer.encode_batch(TEXTS)
        assert all(0 <= i < tokenizer.vocab_size for row in ids for i in row.tolist())
        assert 0 <= tokenizer.eos_id < tokenizer.vocab_size
        for row in ids:
            tokenizer.decode(row.tolist())
        tokenizer.hf.save_pretrained("out/saved")
        again = build_tokenizer("out/saved").encode_batch(TEXTS)
        assert [row.tolist() for row in again] == [row.tolist() for row in ids]
    except UserError as error:
        print(f"flame: {error}", file=sys.stderr)
        return REFUSED
    return 0


AREA = Area("tokenizers", CASES, write, run)


@pytest.mark.parametrize("count", [100, pytest.param(3_000, marks=pytest.mark.slow)])
def test_a_tokenizer_is_used_or_rejected_with_a_line(count, tmp_path, capsys):
    check(AREA, count, tmp_path, capsys)
