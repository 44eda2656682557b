import json
import sysconfig
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flame.config.schema import JobConfig
from flame.data.fast import Checked, open_fast
from flame.data.tokenize import build_tokenizer, load_tokenizer
from flame.errors import UserError

GROUPED = {  # digits in groups of three from the left, each group a token
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {
        "type": "Split",
        "pattern": {"Regex": r"\p{N}{1,3}"},
        "behavior": "Isolated",
        "invert": False,
    },
    "model": {"type": "WordLevel", "vocab": {"123": 0, "456": 1, "7": 2, "<|endoftext|>": 3}, "unk_token": "7"},
}


def save(folder, rules, names=None):
    """A tokenizer's folder, as its name."""
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    (folder / "tokenizer_config.json").write_text(json.dumps(names or {"bos_token": "<s>", "eos_token": "</s>"}))
    return str(folder)


HARD = [
    "",
    "a b\n\tc  ",
    "né日本🙂👩‍👩‍👧 \u200b",
    "\x00\x7f\u00ad\ufffd",
    "<|endoftext|>x",
    "x" * 5000,
    " ".join(map(chr, range(300))),
]


@pytest.fixture(scope="module")
def library():
    return [p.read_text(encoding="utf-8") for p in sorted(Path(sysconfig.get_path("stdlib")).glob("c*.py"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, library):
    """A folder with a small BPE that puts a BOS before every text unless told not to, and truncates if let."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    backend.train_from_iterator(
        library,
        trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = tmp_path_factory.mktemp("bpe")
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=8)
    hf.save_pretrained(path)
    return path


def test_a_byte_is_its_own_id_and_every_text_comes_back():
    tokenizer = build_tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.get_vocab_size(), tokenizer.eos_id, tokenizer.bos_id) == (
        257,
        257,
        256,
        None,
    )
    assert tokenizer.encode("aé🙂") == list("aé🙂".encode())
    for text in HARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    everything = "".join(map(chr, range(0x2FF)))
    assert tokenizer.encode(everything) == list(everything.encode())


def test_the_byte_tokenizer_can_be_saved_and_loaded_by_transformers(tmp_path):
    tokenizer = build_tokenizer("byte")
    tokenizer.hf.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == 257 and again.eos_token_id == 256
    for text in HARD:
        assert again.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert again.decode(tokenizer.encode(text)) == text
    assert build_tokenizer(str(tmp_path)).encode(HARD[2]) == tokenizer.encode(HARD[2])


def test_ids_are_those_of_the_hugging_face_tokenizer_without_special_tokens(folder, library):
    tokenizer = build_tokenizer(str(folder))
    hf = AutoTokenizer.from_pretrained(folder)
    texts = [text for text in HARD + library if text]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == hf(texts, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(texts[0])[:1] != [tokenizer.bos_id] == [0]
    assert tokenizer.eos_id == 1 and tokenizer.vocab_size == len(hf)


def test_a_bos_is_put_before_documents_if_asked_for_and_said_to_be_missing_if_not(folder, caplog):
    caplog.set_level("INFO")
    job = JobConfig()
    job.model.tokenizer_path = str(folder)
    assert load_tokenizer(job).prefix == () and "--data.add_bos" in caplog.text
    caplog.clear()
    job.data.add_bos = True
    assert load_tokenizer(job).prefix == (0,) and "--data.add_bos" not in caplog.text
    job.model.tokenizer_path = "byte"
    with pytest.raises(UserError) as error:
        load_tokenizer(job)
    assert (error.value.setting, error.value.allowed) == ("--data.add_bos", "false")


def test_the_parts_of_a_tokenizer_that_changed_are_named(folder):
    tokenizer, rules = build_tokenizer(str(folder)), json.loads((folder / "tokenizer.json").read_text())
    assert tokenizer.changed_rules(json.dumps(rules)) == []
    rules["model"]["merges"] = [" ".join(merge) for merge in rules["model"]["merges"]]  # as older versions wrote them
    assert tokenizer.changed_rules(json.dumps(rules)) == []
    rules["normalizer"] = {"type": "NFC"}
    assert tokenizer.changed_rules(json.dumps(rules)) == ["normalizer"]


def test_what_makes_the_ids_is_kept_where_it_can_be(library, folder, caplog):
    texts = [*HARD, *library[:3]]
    fast, slow = build_tokenizer(str(folder)), build_tokenizer(str(folder))
    slow.use("tokenizers")
    assert (fast.engine, slow.engine) == ("fastokens", "tokenizers")
    assert [a.tolist() for a in fast.encode_batch(texts)] == [b.tolist() for b in slow.encode_batch(texts)]
    slow.use("fastokens")
    assert slow.engine == "tokenizers" and "cannot here" in caplog.text


def test_a_truncating_call_of_the_same_tokenizer_leaves_the_stream_whole(folder, library):
    tokenizer = build_tokenizer(str(folder))
    tokenizer.hf(library[0], truncation=True, max_length=4)
    assert len(tokenizer.encode(library[0])) > 100


def test_a_bare_tokenizer_file_is_enough(folder, tmp_path):
    bare = tmp_path / "tokenizer.json"
    bare.write_bytes((folder / "tokenizer.json").read_bytes())
    assert build_tokenizer(str(bare)).eos_id == 1


def test_a_tokenizer_without_an_end_of_text_is_rejected(tmp_path):
    Backend(models.WordLevel({"a": 0, "?": 1}, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError) as error:
        build_tokenizer(str(tmp_path / "tokenizer.json"))
    assert error.value.setting == "--model.tokenizer_path" and "no EOS" in error.value.found


@pytest.mark.parametrize("path", ["/no/such/folder", "nowhere/tokenizer.json", "./here", "", None, "nobody/nothing"])
def test_a_tokenizer_that_is_not_there_is_one_line(path):
    with pytest.raises(UserError) as error:
        build_tokenizer(path)
    assert error.value.setting == "--model.tokenizer_path" and "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma"])
@pytest.mark.parametrize("file", ["tokenizer.model", "vocab.txt", "model.safetensors"])
def test_a_folder_without_a_tokenizer_json_is_one_line(family, file, tmp_path, capfd):
    """The classes of many families make a tokenizer of special tokens alone where there is no vocabulary."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    (tmp_path / file).write_text("{}")
    with pytest.raises(UserError) as error:
        build_tokenizer(str(tmp_path))
    assert error.value.setting == "--model.tokenizer_path"
    assert error.value.found == f"no tokenizer.json in {tmp_path}"
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("content", ["null", "[]", "{", ""])
def test_a_damaged_tokenizer_config_is_named(content, tmp_path):
    save(tmp_path, GROUPED)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError) as error:
        build_tokenizer(str(tmp_path))
    assert error.value.setting == "--model.tokenizer_path" and "tokenizer_config.json" in error.value.found


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [r'{"backend": "\ud800"}', r'{"extra": {"\udc00": 1}}', r'{"extra": ["a\ud800"]}'])
def test_text_that_could_not_be_saved_with_a_tokenizer_is_one_line(content, file, tmp_path):
    save(tmp_path, GROUPED)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError) as error:
        build_tokenizer(str(tmp_path))
    assert error.value.setting == "--model.tokenizer_path" and "surrogates not allowed" in error.value.hint


def test_a_broken_tokenizer_file_is_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError) as error:
        build_tokenizer(str(tmp_path / "tokenizer.json"))
    assert error.value.hint.startswith("not loadable")


def test_the_vocabulary_ends_after_the_largest_id(folder, tmp_path):
    rules = json.loads((folder / "tokenizer.json").read_text())
    last = max(rules["model"]["vocab"], key=rules["model"]["vocab"].get)
    rules["model"]["vocab"][last] = 700
    tokenizer = build_tokenizer(save(tmp_path, rules))
    assert (tokenizer.vocab_size, tokenizer.get_vocab_size(), len(tokenizer.hf)) == (701, 701, 600)
    with_token = build_tokenizer(str(tmp_path), add_tokens=["<|a|>"])  # gets the lowest id that is free
    assert (with_token.vocab_size, with_token.added) == (701, 0)
    assert with_token.encode("<|a|>") == [600]


def test_a_token_to_add_that_spells_other_text_is_rejected():
    with pytest.raises(UserError) as error:
        build_tokenizer("byte", add_tokens=["<|a|>", "\u00e9"])  # as which byte-level tokenizers write byte 0xE9
    assert error.value.setting == "--model.add_tokens" and "'\u00e9'" in str(error.value)
    assert build_tokenizer("byte", add_tokens=["a", "\u65e5"]).encode("a\u65e5") == [97, 257]


def test_the_end_of_text_inside_a_document_is_its_token(folder):
    assert build_tokenizer("byte").encode("a<|endoftext|>") == [97, 256]
    assert build_tokenizer(str(folder)).encode("</s><s>") == [1, 0]


def test_special_tokens_are_plain_text_where_the_tokenizer_says_so(folder, tmp_path):
    names = {"eos_token": "</s>", "split_special_tokens": True}
    tokenizer = build_tokenizer(save(tmp_path, json.loads((folder / "tokenizer.json").read_text()), names))
    assert tokenizer.encode("</s>") == tokenizer.hf("</s>", add_special_tokens=False).input_ids != [1]


FAMILIES = ("qwen2", "qwen3_5", "gpt2", "llama", "gemma", "bert", "cohere")  # whose classes have rules of their own


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_beside_a_tokenizer_does_not_change_its_rules(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    tokenizer = build_tokenizer(save(tmp_path, GROUPED, {"eos_token": "<|endoftext|>"}))
    assert tokenizer.encode("1234567") == Backend.from_str(json.dumps(GROUPED)).encode("1234567").ids
    assert tokenizer.encode("1234567") == [0, 1, 2]


def test_code_that_a_tokenizer_names_is_neither_run_nor_passed_on(tmp_path):
    names = {"eos_token": "<|endoftext|>", "auto_map": {"AutoTokenizer": ["code.Slow", "code.Fast"]}}
    (tmp_path / "code.py").write_text("raise SystemExit('code was run')")
    tokenizer = build_tokenizer(save(tmp_path, GROUPED, names))
    assert tokenizer.encode("1234567") == [0, 1, 2]
    tokenizer.hf.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()


def test_special_tokens_that_a_folder_leaves_to_the_class_are_those_of_the_class(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer.json").write_text(json.dumps(GROUPED))
    tokenizer = build_tokenizer(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (3, 3, 4)


def share_an_id(rules):
    rules["model"]["vocab"]["Q"] = 0


def leave_no_room(rules):
    for token in rules["model"]["vocab"]:
        rules["model"]["vocab"][token] += 100
    for token in rules["added_tokens"]:
        token["id"] += 100


def drop_at_random(rules):
    rules["model"]["dropout"] = 0.1


def lose_a_merged_token(rules):
    first, second = rules["model"]["merges"][50]
    del rules["model"]["vocab"][first + second]


@pytest.mark.parametrize("spoil", [share_an_id, leave_no_room, drop_at_random, lose_a_merged_token])
def test_a_tokenizer_whose_ids_are_not_to_be_trusted_is_one_line(spoil, folder, tmp_path):
    rules = json.loads((folder / "tokenizer.json").read_text())
    spoil(rules)
    with pytest.raises(UserError) as error:
        build_tokenizer(save(tmp_path, rules), add_tokens=["<|a|>"])
    assert error.value.setting == "--model.tokenizer_path" and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("model", [models.WordLevel, models.WordPiece])
def test_a_text_that_cannot_be_encoded_is_one_line_that_names_it(model, tmp_path, caplog):
    backend = Backend(model({"a": 0, "b": 1, "</s>": 2}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer(str(tmp_path))
    assert "cannot encode every text" in caplog.text and not tokenizer.encodes_all
    assert tokenizer.encode("a b") == [0, 1]
    with pytest.raises(UserError) as error:
        tokenizer.encode_batch(["a b", "b", "a stranger", "a"])
    assert error.value.setting == "--model.tokenizer_path"
    assert "'a stranger'" in error.value.found and str(tmp_path) in error.value.found


def test_bytes_that_no_text_has_need_no_token(library, folder, tmp_path, caplog):
    rules = json.loads((folder / "tokenizer.json").read_text())
    for byte in (0xC0, 0xC1, *range(0xF5, 0x100)):
        del rules["model"]["vocab"][chr(byte)]
    tokens = sorted(rules["model"]["vocab"], key=rules["model"]["vocab"].get)
    rules["model"]["vocab"] = {token: id for id, token in enumerate(tokens)}
    tokenizer = build_tokenizer(save(tmp_path, rules))
    assert "leaves them out" not in caplog.text
    right = [
        encoding.ids
        for encoding in Backend.from_str(json.dumps(rules)).encode_batch_fast(HARD, add_special_tokens=False)
    ]
    assert [ids.tolist() for ids in tokenizer.encode_batch(HARD)] == right


@pytest.mark.parametrize("rare", [False, True])
def test_bytes_without_a_token_are_left_out_as_the_tokenizer_leaves_them_out(rare, library, folder, tmp_path, caplog):
    rules = json.loads((folder / "tokenizer.json").read_text())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    merged = {part for merge in rules["model"]["merges"] for part in merge}
    unmerged = [token for token in rules["model"]["vocab"] if token in alphabet and token not in merged]
    for token in ["\u00df"] if rare else unmerged:  # byte 0xDF, that of few letters
        del rules["model"]["vocab"][token]
    tokens = sorted(rules["model"]["vocab"], key=rules["model"]["vocab"].get)
    rules["model"]["vocab"] = {token: id for id, token in enumerate(tokens)}  # without gaps
    tokenizer, backend = build_tokenizer(save(tmp_path, rules)), Backend.from_str(json.dumps(rules))
    assert "leaves them out" in caplog.text
    texts = ["\u07c1 \u07fa", *HARD, *library[:5]]
    right = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == right


CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLIT = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(CONTRACTIONS + SPACES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
SENTENCE_PIECE = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
KINDS = {  # as GPT-2, GPT-NeoX, Llama 3, Qwen and Llama 2 have it: normalizer, pre-tokenizer, its alphabet is bytes
    "gpt2": (None, PLAIN),
    "gpt_neox": (normalizers.NFC(), PLAIN),
    "llama3": (None, SPLIT),
    "qwen": (normalizers.NFC(), SPLIT),
    "llama2": (SENTENCE_PIECE, None),
}


def learn(kind, texts):
    """A small BPE of a kind, with a special token and a run of spaces among the added ones."""
    normalizer, pre_tokenizer = KINDS[kind]
    bytewise = pre_tokenizer is not None
    special = [] if bytewise else ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Backend(models.BPE() if bytewise else models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if normalizer:
        backend.normalizer = normalizer
    if pre_tokenizer:
        backend.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if bytewise else [],
        max_token_length=12,
        show_progress=False,
    )
    backend.train_from_iterator([line for text in texts[:4] for line in text.splitlines()], trainer)
    backend.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    backend.add_tokens([AddedToken("    ", normalized=bytewise)])
    return backend


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_ids_are_those_of_the_tokenizer_itself(kind, library):
    backend = learn(kind, library)
    encode = open_fast(backend)
    assert encode is not None
    texts = [*HARD, *library[:20], "a" * 100_000, " " * 100_000, " \n" * 50_000, "'ll I'VE 1234567 \u0301\u0301e\u0301"]
    right = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    assert [ids.tolist() for ids in encode(texts)] == right
    assert len({ids.dtype.name for ids in encode(texts)} | {"int32"}) == 1


def test_a_tokenizer_that_the_fast_one_cannot_read_is_used_itself(library, tmp_path):
    backend = Backend(models.Unigram([("<unk>", 0.0), ("\u2581a", -1.0), ("b", -2.0)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    assert open_fast(backend) is None
    backend.add_special_tokens([AddedToken("</s>")])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("ab a") == backend.encode("ab a").ids == [1, 2, 1]


def test_a_fast_tokenizer_that_gives_other_ids_is_not_used(library, caplog):
    class Misread:
        """What is read of it splits digits otherwise than it does itself."""

        def __init__(self, itself, read):
            self.to_str = read.to_str
            self.encode_batch_fast, self.decode = itself.encode_batch_fast, itself.decode
            self.get_vocab_size, self.encode_special_tokens = itself.get_vocab_size, False

    itself, read = learn("llama3", library), learn("llama3", library)
    read.pre_tokenizer = PLAIN
    assert open_fast(Misread(itself, itself)) is not None
    assert open_fast(Misread(itself, read)) is None
    assert "gives others" in caplog.text


def test_a_text_that_the_fast_tokenizer_encodes_otherwise_stops_the_run(library):
    backend = learn("llama3", library)
    right = open_fast(backend)
    wrong = Checked(lambda texts: [ids[1:] for ids in right(texts)], backend)
    with pytest.raises(UserError) as error:
        wrong(["a text " * 500])
    assert "text a" in error.value.found and len(error.value.found) < 1100
    for _ in range(100):
        Checked(right, backend)(["plain", "a text " * 500, ""])


def test_an_end_of_text_known_by_its_name_alone_is_the_same_token_in_what_a_run_keeps(tmp_path):
    vocab = {"<unk>": 0, "</s>": 1, "</": 2, "s": 3, ">": 4, "a": 5}
    rules = {"added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}}
    rules["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", **rules}))
    tokenizer = build_tokenizer(str(tmp_path / "tokenizer.json"))
    tokenizer.hf.save_pretrained(tmp_path / "kept")
    assert tokenizer.encode("a </s>") == build_tokenizer(str(tmp_path / "kept")).encode("a </s>") == [5, 1]
