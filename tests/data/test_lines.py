"""JSON in every form that files have it in: each item is a row, and what cannot be read costs its row alone."""

import codecs
import json
import lzma
import os

import pytest

from flame.data.document import Bad
from flame.errors import UserError
from tests.data.fakes import build

BOM = codecs.BOM_UTF8
BROKEN = {  # what a .json file holds that is not JSON
    "cut": b'[{"text": "a"}, {"text": ',
    "latin": b'[{"text": "caf\xe9"}]',
    "deep": b"[" * 100_000,
    "word": b"nothing",
}
WITHOUT_ROWS = {"empty": b"", "space": b" \n\n", "array": b"[]"}
WITHOUT_DOCUMENTS = {"null": b"null", "nulls": b"null\nnull\n", "number": b"5", "numbers": b"[1, 2]", "words": b"true"}


def read(path, content=None, **settings):
    if content is not None:
        path.write_bytes(content)
    (source,) = build(path, **settings)
    return source.rows.texts(list(range(len(source.rows))))


def test_a_byte_order_mark_is_no_part_of_a_line_or_a_text(tmp_path):
    lines = b'{"text": "a"}\n{"text": "b"}\n'
    assert read(tmp_path / "one.jsonl", BOM + b'{"text": "a"}') == ["a"]
    assert read(tmp_path / "two.jsonl", BOM + lines + BOM + lines) == ["a", "b", "a", "b"], "two files joined"
    assert read(tmp_path / "lines.json", BOM + lines) == ["a", "b"]
    assert read(tmp_path / "array.json", BOM + b'[{"text": "a"}]') == ["a"]
    assert read(tmp_path / "z.jsonl.xz", lzma.compress(BOM + lines)) == ["a", "b"]
    assert read(tmp_path / "t.txt", BOM + "\ufeffa".encode()) == ["\ufeffa"], "one mark, the other is text"
    assert read(tmp_path / "t.txt.xz", lzma.compress(BOM + b"a")) == ["a"]


@pytest.mark.parametrize(
    "content, expected",
    [
        (b'[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
        (b'\n\n [\n{"text": "a"},\n{"text": "b"}\n]\n', ["a", "b"]),
        (b'[\n  {\n    "text": "a",\n    "meta": {}\n  }\n]', ["a"]),
        (b'{\n  "text": "a"\n}\n{\n  "text": "b"\n}', ["a", "b"]),
        (b'{"text": "a"} {"text": "b"}', ["a", "b"]),
        (b'["a", "b"]', ["a", "b"]),
        (b'[{"text": "a"}]\n[{"text": "b"}]', ["a", "b"]),
        (b'\n{"text": "a"}\n', ["blank line", "a"]),
        (b'{"text": \n{"text": "a"}\n', ["broken JSON", "a"]),
        (
            b'[{"text": "a"}, [-1], 7, {}, {"text": ["x"]}, {"text": {}}]',
            ["a", "token ids", "int", "null", "something else", "dict"],
        ),
        ('[{"text": "\\ud83d"}, {"text": "\U0001f642"}]'.encode(), ["invalid UTF-8", "\U0001f642"]),
    ],
)
def test_json_files_of_every_shape_give_their_items(tmp_path, content, expected):
    found = read(tmp_path / "a.json", content)
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected, strict=True):
        assert wanted in row.reason if isinstance(row, Bad) else row == wanted


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_not_json_is_rejected_with_the_name_of_the_file(tmp_path, content, streaming):
    for name, compress in (("a.json", bytes), ("a.json.xz", lzma.compress)):
        with pytest.raises(UserError) as error:
            read(tmp_path / name, compress(content), streaming=streaming)
        assert error.value.setting == str(tmp_path / name) and "JSON" in error.value.hint


@pytest.mark.parametrize("content", WITHOUT_ROWS.values(), ids=WITHOUT_ROWS)
def test_a_file_without_rows_is_rejected(tmp_path, content):
    with pytest.raises(UserError) as error:
        read(tmp_path / "a.json", content)
    assert error.value.setting == "--training.dataset" and "no rows" in error.value.found


@pytest.mark.parametrize("content", WITHOUT_DOCUMENTS.values(), ids=WITHOUT_DOCUMENTS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_file_without_documents_is_rejected_before_the_start(tmp_path, name, content):
    with pytest.raises(UserError) as error:
        read(tmp_path / name, content)
    assert error.value.setting in ("--training.dataset", "--data.column") and name in error.value.found


def test_a_text_file_without_text_is_rejected_before_the_start(tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path / "a.txt", b"")
    assert "no document" in error.value.found and error.value.hint == f"{tmp_path}/a.txt: empty"


def test_the_first_rows_do_not_decide_what_a_column_holds_if_later_ones_can_be_read(tmp_path):
    rows = [b'{"text": 5}', b'{"text": null}', b"broken", b'{"text": ["a"]}', b'{"text": "a"}', b'{"text": [1, 2]}']
    *bad, text, ids = read(tmp_path / "a.jsonl", b"\n".join(rows))
    assert text == "a" and ids.tolist() == [1, 2]
    assert [row.place for row in bad] == [f"{tmp_path}/a.jsonl:{i}" for i in (1, 2, 3, 4)]


def test_a_column_that_only_a_later_file_has_is_found(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"title": 5}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    none, text = read(tmp_path)
    assert none == Bad("null", f"{tmp_path}/a.jsonl:1") and text == "b"


@pytest.mark.parametrize("name", ["chat.jsonl", "chat.json"])
@pytest.mark.parametrize("column", [None, "messages"])
def test_a_column_of_objects_is_rejected_and_said_to_hold_objects(tmp_path, name, column):
    (tmp_path / name).write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}], "id": 3}))
    with pytest.raises(UserError) as error:
        read(tmp_path / name, column=column)
    assert error.value.setting == "--data.column"
    assert "messages (lists of objects)" in error.value.hint and error.value.allowed == "a column of text or token ids"


def test_ids_beyond_64_bits_are_bad_rows_in_every_form(tmp_path):
    rows = [{"input_ids": [1, 2]}, {"input_ids": [2**63]}, {"input_ids": [10**30]}, {"input_ids": [-(2**70)]}]
    for name, content in (("a.jsonl", "\n".join(map(json.dumps, rows))), ("a.json", json.dumps(rows))):
        good, *bad = read(tmp_path / name, content.encode(), column="input_ids")
        assert good.tolist() == [1, 2] and all(isinstance(row, Bad) for row in bad)
    text = read(tmp_path / "b.jsonl", b'{"text": "a"}\n{"text": [9223372036854775808]}\n{"text": 1e19}')
    assert text[0] == "a" and all(isinstance(row, Bad) for row in text[1:])


def test_a_file_that_is_replaced_by_other_text_of_its_size_is_logged_once(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    os.utime(path, (1, 1))
    (source,) = build(path)
    assert source.rows.texts([0]) == ["a"] and not caplog.messages
    path.write_text('{"text": "c"}\n{"text": "d"}\n')
    for _ in range(2):
        assert source.rows.texts([1]) == ["d"]
    assert [line.split(", ")[0] for line in caplog.messages] == [f"{path} was modified since the start of the run"]


def test_a_file_that_changes_or_goes_away_while_it_is_read_ends_the_run_in_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    (source,) = build(path)
    path.write_text('{"text": "a"}\n')
    with pytest.raises(UserError) as error:
        source.rows.texts([1])
    assert error.value.setting == str(path) and "size" in error.value.found
    path.unlink()
    with pytest.raises(UserError) as error:
        source.rows.texts([1])
    assert error.value.setting == str(path) and "cannot be read" in error.value.hint
