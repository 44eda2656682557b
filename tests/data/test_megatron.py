"""Megatron's .bin and .idx, byte by byte, and the command that writes them."""

import json

import numpy as np
import pytest

from flame.data.__main__ import main
from flame.data.document import Bad
from flame.data.megatron import write
from flame.errors import UserError
from tests.data.fakes import EOS, build, loader

BIN = bytes.fromhex("0100 0200 0300 2c01 0500 0600")  # 1 2 3, 300, 5 6
IDX = bytes.fromhex(
    "4d4d494449445800 00"  # MMIDIDX
    "0100000000000000 08"  # version 1, u16
    "0300000000000000 0400000000000000"  # 3 sequences, 4 bounds
    "03000000 01000000 02000000"  # lengths
    "0000000000000000 0600000000000000 0800000000000000"  # offsets in bytes
    "0000000000000000 0100000000000000 0200000000000000 0300000000000000"  # bounds of documents
)


def pair(folder, idx=IDX, data=BIN, name="x"):
    (folder / f"{name}.bin").write_bytes(data)
    (folder / f"{name}.idx").write_bytes(idx)
    return folder / name


def read(path):
    (source,) = build(path)
    return [row if isinstance(row, Bad) else row.tolist() for row in source.rows.texts(range(len(source.rows)))]


def test_the_written_files_have_the_bytes_of_the_format(tmp_path):
    documents = [np.array(ids, np.int32) for ids in ([1, 2, 3], [300], [5, 6])]
    assert write(tmp_path / "new" / "x", documents, 301) == (3, 6)
    assert (tmp_path / "new" / "x.bin").read_bytes() == BIN
    assert (tmp_path / "new" / "x.idx").read_bytes() == IDX
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["x.bin", "x.idx"]


@pytest.mark.parametrize("vocab, code, size", [(65499, 8, 2), (65500, 4, 4)])
def test_a_large_vocabulary_is_written_as_four_bytes(tmp_path, vocab, code, size):
    write(tmp_path / "x", [np.array([vocab - 1])], vocab)
    assert (tmp_path / "x.idx").read_bytes()[17] == code
    assert (tmp_path / "x.bin").read_bytes() == (vocab - 1).to_bytes(size, "little")
    assert read(tmp_path / "x.bin") == [[vocab - 1]]


@pytest.mark.parametrize("path", ["x", "x.bin", "x.idx", "*.bin", ""])
def test_a_pair_is_read_by_any_of_its_names(tmp_path, path):
    pair(tmp_path)
    assert read(tmp_path / path) == [[1, 2, 3], [300], [5, 6]]
    assert build(tmp_path / path)[0].name in ("x", tmp_path.name)


def test_all_sequences_of_a_document_are_joined_modes_ignored_and_an_empty_document_is_bad(tmp_path):
    bounds = b"".join(bound.to_bytes(8, "little") for bound in (0, 2, 2, 3))
    path = pair(tmp_path, IDX[:-32] + bounds + b"\0\0\0")
    assert read(path) == [[1, 2, 3, 300], Bad("empty", f"{path}.bin: document 1"), [5, 6]]


@pytest.mark.parametrize("code, data, ids", [(1, "0102fe", [1, 2, 254]), (5, "0900000000000000" * 3, [9, 9, 9])])
def test_other_integers_are_read_by_their_code(tmp_path, code, data, ids):
    data = bytes.fromhex(data)
    idx = IDX[:17] + bytes([code]) + (1).to_bytes(8, "little") + (2).to_bytes(8, "little")
    idx += (3).to_bytes(4, "little") + bytes(8) + bytes(8) + (1).to_bytes(8, "little")
    assert read(pair(tmp_path, idx, data)) == [ids]


@pytest.mark.parametrize(
    "idx, data, rule",
    [
        (b"MMIDIDX", BIN, "a Megatron index, which begins with MMIDIDX"),
        (IDX.replace(b"MMIDIDX", b"MMIDIDY"), BIN, "a Megatron index, which begins with MMIDIDX"),
        (IDX[:17] + b"\x07" + IDX[18:], BIN, "dtype code 7"),
        (IDX[:9] + b"\x02" + IDX[10:], BIN, "version 2"),
        (IDX[:-1], BIN, "cut short"),
        (IDX, BIN[:-1], "cut short"),
        (IDX[:-8] + bytes(8), BIN, "not the data of"),
    ],
)
def test_files_that_are_cut_short_or_of_another_format_are_rejected(tmp_path, idx, data, rule):
    with pytest.raises(UserError) as error:
        build(pair(tmp_path, idx, data))
    assert error.value.setting.startswith(f"{tmp_path}/x.") and rule in str(error.value)


@pytest.mark.parametrize("offset", ["0100000000000000", "ffffffffffffffff", "0a00000000000000"])
def test_an_index_that_points_outside_its_data_or_between_ids_is_no_traceback(tmp_path, offset):
    at = 34 + 12
    idx = IDX[:at] + bytes.fromhex(offset) + IDX[at + 8 :]
    try:
        found = read(pair(tmp_path, idx))
    except UserError as error:
        assert error.setting == f"{tmp_path}/x.bin"
    else:
        assert offset == "0100000000000000" and found[1:] == [[300], [5, 6]]


def test_documents_of_ids_are_trained_on_as_they_are_with_one_eos_after_each(tmp_path):
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 3, 256]}\n{"input_ids": [4, 5]}\n')
    for sources in (build(tmp_path / "ids.jsonl"), build(pair(tmp_path, data=bytes(12)))):
        run = loader(sources, lanes=1, batch=1, window=1, seq_len=9)
        fed, labels = next(iter(run))
        tokens = [*fed["input"].flatten().tolist(), labels.flatten().tolist()[-1]]
        if sources[0].name == "ids":
            assert tokens == [1, 2, 3, EOS, 4, 5, EOS, 1, 2, 3]
        else:
            assert tokens == [0, 0, 0, EOS, 0, EOS, 0, 0, EOS, 0]


def test_ids_that_the_tokenizer_does_not_have_are_rejected(tmp_path):
    with pytest.raises(UserError) as error:
        next(iter(loader(build(pair(tmp_path)), lanes=1)))
    assert (error.value.setting, error.value.found) == ("source x", "token id 300")
    assert error.value.allowed.startswith("below 257")


def test_packing_any_source_keeps_its_documents_in_order_and_names_bad_rows(tmp_path, capsys):
    lines = [json.dumps({"body": text}) for text in ("héllo", "", "two")]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    flags = ["--dataset", f"{tmp_path}/t.jsonl,stdlib", "--tokenizer", "byte", "--column", "body"]
    assert main(["pack", str(tmp_path / "out"), *flags]) == 0
    said = capsys.readouterr()
    assert f"source t: {tmp_path}/t.jsonl:2 is skipped: empty" in said.err and "tokens" in said.out
    assert said.out.startswith("source t: 3 rows, 1 json file, ")
    packed = read(tmp_path / "out")
    assert packed[:2] == [[*"héllo".encode(), EOS], [*b"two", EOS]] and len(packed) > 500
    assert main(["pack", str(tmp_path / "again"), "--dataset", f"{tmp_path}/out.bin", "--tokenizer", "byte"]) == 0
    assert all((tmp_path / f"again.{e}").read_bytes() == (tmp_path / f"out.{e}").read_bytes() for e in ("bin", "idx"))


def test_packing_names_the_files_that_it_leaves_out(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    for name in ("a.jsonl", "b.rst"):
        (tmp_path / "mine" / name).write_text('{"text": "a"}\n')
    assert main(["pack", str(tmp_path / "out"), "--dataset", f"{tmp_path}/mine", "--tokenizer", "byte"]) == 0
    assert "source mine: not read: " in (said := capsys.readouterr().out) and "b.rst\n" in said


@pytest.mark.parametrize("name", ["out.bin", "out.idx"])
def test_packing_overwrites_nothing(name, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    (tmp_path / "t.txt").write_text("text")
    for out in (tmp_path / "out", tmp_path / "t.txt" / "out", tmp_path / (300 * "x")):
        assert main(["pack", str(out), "--dataset", f"{tmp_path}/t.txt", "--tokenizer", "byte"]) == 2
        line = capsys.readouterr().err
        assert line.startswith("flame: OUT: ") and line.count("\n") == 1
    assert (tmp_path / name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_packing_rejects_too_many_bad_rows_and_sources_without_documents(tmp_path, capsys):
    (tmp_path / "t.jsonl").write_text('{"text": ""}\n{"text": ""}\n{"text": "a"}\n')
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    job = ["pack", str(tmp_path / "out"), "--tokenizer", "byte", "--dataset"]
    assert main([*job, f"{tmp_path}/t.jsonl", "--max-bad-rows", "1"]) == 2
    assert "--max-bad-rows: found 2 bad rows among 3 of source t, must be at most 1" in capsys.readouterr().err
    assert main([*job, f"{tmp_path}/t.jsonl", "--max-bad-rows", "nan"]) == 2
    assert "--max-bad-rows: found nan, must be 0 or more" in capsys.readouterr().err
    assert main([*job, f"{tmp_path}/empty.jsonl"]) == 2
    assert f"no document in {tmp_path}/empty.jsonl" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
