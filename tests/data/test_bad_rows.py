"""Rows without a document: counted, located and skipped up to a limit; never silently."""

import json
from itertools import islice, pairwise
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from flame.config.schema import Data
from flame.data import cache, files, lines
from flame.data.document import LONGEST, Bad, accept, allow_bad
from flame.data.source import Source
from flame.errors import UserError
from flame.training.data_accounting import DataAccounting
from tests.data.fakes import EOS, Tape, Texts, build, loader
from tests.launch import SMALL, metrics, train
from tests.tiny import write_config

GOOD = [f"document {i} " + "." * 60 for i in range(60)]
LINES = {  # what stands in a line: a word of the reason
    b'{"text": null}': "null",
    b'{"other": "x"}': "null",
    b'{"text": ""}': "empty",
    b'{"text": 7}': "int, not text",
    b'{"text": {"a": 1}}': "dict, not text",
    b'{"text": ["a"]}': "something else than token ids",
    b'{"text": "half': "broken JSON",
    b'{"text": "a"} {"text": "b"}': "broken JSON",
    b'["text"]': "not a JSON object",
    b'{"text": "\xff\xfe"}': "invalid UTF-8",
    '{"text": "a"}'.encode("utf-16"): "UTF-16",
    b'{"text": "\\ud800 alone"}': "surrogate",
    b"": "blank line",
    b"[" * 100_000: "broken JSON",
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """One of every sort of bad line among good ones."""
    path = tmp_path_factory.mktemp("bad") / "rows.jsonl"
    good = iter(GOOD)
    lines = [line for bad in LINES for line in (json.dumps({"text": next(good)}).encode(), bad)]
    path.write_bytes(b"\n".join([*lines, *(json.dumps({"text": text}).encode() for text in good)]))
    return path


def test_each_broken_line_is_skipped_alone_and_named_with_file_and_line(file):
    rows = build(file)[0].rows
    found = rows.texts(list(range(len(rows))))
    assert [row for row in found if not isinstance(row, Bad)] == GOOD
    bad = [row for row in found if isinstance(row, Bad)]
    assert [row.place for row in bad] == [f"{file}:{2 * i + 2}" for i in range(len(LINES))]
    for row, word in zip(bad, LINES.values(), strict=True):
        assert word in row.reason


@pytest.mark.parametrize("kind", [Texts, Tape])
def test_documents_without_tokens_are_skipped_counted_and_named(kind):
    texts = [text for good in GOOD for text in (good, "\u200b" * 3, np.array([EOS]))]
    run = loader([Source("a", 1.0, kind(texts))], epochs=1, lanes=1, batch=1)
    tokens = [token for fed, _ in run for token in fed["input"].flatten().tolist()]
    assert (EOS, EOS) not in pairwise(tokens) and tokens.count(EOS) > 50
    bad, read, _ = run.skipped()["a"]
    assert bad in (118, 119, 120) and bad + 58 <= read <= 180, "what follows the last full row is not read"
    named = {(row.reason, row.place) for row in run.noted()["a"]}
    assert named == {("no tokens", repr("\u200b" * 3)), ("no tokens", "a bare EOS")}


def test_a_source_without_any_token_ends_the_run_in_one_line():
    run = loader([Source("a", 1.0, Texts(["\u200b"] * 20))], lanes=1, batch=1)
    with pytest.raises(UserError) as error:
        next(iter(run))
    assert error.value.setting == "source a" and error.value.found.startswith("no document")
    assert "no tokens" in error.value.hint


def test_a_lane_reads_past_bad_rows_and_the_loader_counts_and_names_them(file):
    run = loader(build(file), epochs=1, lanes=1, batch=1)
    tokens = [token for fed, _ in run for token in fed["input"].flatten().tolist()]
    assert tokens.count(EOS) in range(len(GOOD) - len(tokens) // 24, len(GOOD))
    assert run.skipped()["rows"] == (len(LINES), len(LINES) + len(GOOD) - 1, 1), "the last document filled no row"
    assert len(run.noted()["rows"]) == 5 and all(str(file) in row.place for row in run.noted()["rows"])


def test_a_text_file_that_cannot_be_read_is_skipped_alone_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST", 100)
    contents = {"a": b"one", "b": b"\xff\xfe", "c": b"", "d": 500 * b"d", "e": "f\u00fcnf".encode()}
    for name, content in contents.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    rows = build(tmp_path)[0].rows
    one, *bad, five = rows.texts(range(5))
    assert (one, five) == ("one", "f\u00fcnf")
    assert [row.place for row in bad] == [str(tmp_path / f"{name}.txt") for name in "bcd"]
    assert [row.reason for row in bad] == ["invalid UTF-8", "empty", "more than 100 characters"]


def test_a_row_of_a_table_is_named_by_its_number_whether_streamed_or_not(tmp_path):
    values = [b"one", None, b"", b"\xff\xfe", b"five"]
    column = pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "t.parquet")
    expected = ["one", Bad("null", "row 1"), Bad("empty", "row 2"), Bad("invalid UTF-8", "row 3"), "five"]
    assert build(tmp_path / "t.parquet")[0].rows.texts(range(5)) == expected
    stream = build(tmp_path / "t.parquet", streaming=True)[0].rows
    batches = list(stream.batches(2))
    assert [row for batch, _ in batches for row in batch] == expected
    assert next(stream.batches(2, batches[0][1]))[0] == expected[2:4]


def test_a_document_that_is_too_long_is_bad_and_one_at_the_limit_is_not():
    assert accept("x" * LONGEST, "row 0") == "x" * LONGEST
    assert "at most" in accept("x" * (LONGEST + 1), "row 0").reason


def test_a_line_far_too_long_is_not_even_read(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LONGEST", 10)
    (tmp_path / "l.jsonl").write_text(json.dumps({"text": "x" * 100}) + '\n{"text": "y"}\n')
    assert build(tmp_path / "l.jsonl")[0].rows.texts([0, 1]) == [
        Bad("a line of 113 bytes", f"{tmp_path}/l.jsonl:1"),
        "y",
    ]


def test_token_ids_are_accepted_and_other_numbers_are_not():
    assert accept([3, 1], "row 0").tolist() == [3, 1] and accept([3, 1], "row 0").dtype == np.int32
    for value in ([], [1.5], [None], [True], [-1], [2**40], np.array([0.5])):
        assert isinstance(accept(value, "row 0"), Bad), value


def test_an_index_is_made_anew_when_the_file_changes(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"text": "a"}\n')
    assert len(build(path)[0].rows) == 1
    path.write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c"}')
    assert build(path)[0].rows.texts([2, 0]) == ["c", "a"]


def test_lines_across_the_chunks_in_which_a_file_is_read_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CHUNK", 7)
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in GOOD))
    starts = lines.index_lines(str(path))
    assert [path.read_bytes()[a:b].endswith(b"}\n") for a, b in pairwise(starts)] == [True] * 60


@pytest.mark.parametrize(
    "limit, read, allowed", [(0, 10**6, 0), (7, 10**6, 7), (0.01, 50, 100), (0.01, 10**6, 10**4), (1, 10, 1)]
)
def test_a_limit_is_a_number_of_rows_or_a_share_of_those_read(limit, read, allowed):
    assert allow_bad(limit, read) == allowed


@pytest.mark.parametrize("kind", [Texts, Tape])
@pytest.mark.parametrize("limit", [40, 30])
def test_a_bad_row_is_counted_once_however_many_epochs_read_it(kind, limit):
    run = loader([Source("a", 1.0, kind([*GOOD, *[""] * 40]))], lanes=4, batch=4, window=50)
    data = Data(max_bad_rows=limit, lanes=4)
    context = SimpleNamespace(
        job_config=SimpleNamespace(data=data),
        run=SimpleNamespace(writes=False),
        consensus=SimpleNamespace(gather=lambda value: [value]),
    )
    accounting = DataAccounting(run, None, torch.device("cpu"), context)
    accounting.begin()

    def train():
        for _ in islice(run, 400):
            accounting.read_step(accounting.sum_step(1, 0).tolist())

    if limit == 40:
        train()
        assert run.skipped()["a"][0] > 5 * 40
    else:
        with pytest.raises(UserError, match=r"found 3\d bad rows among \d+ of source a, such as row"):
            train()


def test_bad_rows_in_the_step_in_which_the_data_ends_are_judged(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(('{"text": "one of forty documents"}\n' + "no JSON\n" * 8) * 40)
    done = train(
        *(*SMALL, f"--model.config={write_config(tmp_path, 'llama')}", f"--training.dataset={file}"),
        *("--data.lanes=1", "--data.window=16", "--data.epochs=1", "--data.max_bad_rows=5", "--checkpoint.no_enable"),
        *(
            "--training.local_batch_size=1",
            "--training.gradient_accumulation_steps=8",
            "--training.steps=4",
            f"--job.dump_folder={tmp_path / 'run'}",
        ),
    )
    assert done.returncode != 0 and "flame: --data.max_bad_rows: found" in done.stderr


@pytest.mark.slow
def test_a_run_logs_counts_and_names_bad_rows_of_all_ranks_and_stops_at_the_limit(file, tmp_path):
    job = [
        *(*SMALL, f"--model.config={write_config(tmp_path, 'llama')}", f"--training.dataset={file}"),
        *("--data.lanes=2", "--training.local_batch_size=1", "--training.steps=40", "--checkpoint.no_enable"),
    ]
    done = train(*job, f"--job.dump_folder={tmp_path / 'run'}", ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    last = metrics(tmp_path / "run")[-1]
    assert last["data/rows/skipped"] >= len(LINES)
    assert done.stdout.count(f"source rows: {file}:") == min(len(LINES), 10), "five of each rank, each once"
    stopped = train(*job, f"--job.dump_folder={tmp_path / 'stopped'}", "--data.max_bad_rows=0", ranks=2)
    assert stopped.returncode != 0
    assert "flame: --data.max_bad_rows: found" in stopped.stderr and f"such as {file}:" in stopped.stderr
