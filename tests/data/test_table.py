"""Tables in every form, damaged or not; and a stream that fails now and then."""

import httpx
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from flame.data.document import Bad
from flame.data.source import Source
from flame.data.table import RetryingStream, TableRows, open_column, read_schema
from flame.errors import UserError
from tests.data.fakes import COMPRESS, Tape, build, documents, loader, take
from tests.launch import SMALL, metrics, train_each
from tests.tiny import write_config


class Flaky(Tape):
    """Fails before each of these rows, as many times as it says, in the middle of a window or at its start."""

    def __init__(self, rows, failures, error=ConnectionError):
        super().__init__(rows)
        self.failures, self.error = dict(failures), error

    def batches(self, size, mark=None):
        for batch, after in super().batches(size, mark):
            for row in range(after["row"] - len(batch), after["row"]):
                if self.failures.get(row):
                    self.failures[row] -= 1
                    raise self.error(f"row {row}")
            yield batch, after


def patient(rows, failures, waited, waits=(1, 2, 4), **options):
    return RetryingStream(Flaky(rows, failures, **options), "hub/data", waits, waited.append)


@pytest.mark.parametrize("error", [ConnectionError, TimeoutError, httpx.ReadTimeout])
def test_a_failed_stream_continues_at_the_same_row_after_longer_and_longer_waits(error, caplog):
    rows, waited = documents("a", 50, 10), []
    stream = patient(rows, {0: 2, 23: 3, 49: 1}, waited, error=error)
    assert list(stream.batches(7)) == list(Tape(rows).batches(7))
    assert waited == [1, 2, 1, 2, 4, 1]
    assert "hub/data: row 23; trying again at the same row in 4 s" in caplog.text


def test_a_stream_that_starts_at_a_mark_reads_no_row_before_it():
    rows, waited = documents("a", 50, 10), []
    mark = {"row": 14}
    assert list(patient(rows, {14: 1, 30: 1}, waited).batches(7, mark)) == list(Tape(rows).batches(7, mark))
    assert len(waited) == 2


def test_permanent_errors_and_the_last_of_too_many_failures_end_the_stream():
    waited = []
    for error, expected in ((FileNotFoundError, UserError), (pyarrow.ArrowInvalid, UserError), (KeyError, KeyError)):
        with pytest.raises(expected):
            list(patient(documents("a", 9, 10), {3: 1}, waited, error=error).batches(2))
    assert waited == []
    with pytest.raises(UserError) as error:
        list(patient(documents("a", 9, 10), {3: 4}, waited).batches(2))
    assert waited == [1, 2, 4] and error.value.setting == "hub/data"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_a_failing_stream_is_fed_what_one_on_a_sound_stream_is(workers):
    rows, waited = documents("a", 90, 20), []
    sound = take(iter(loader([Source("a", 1.0, Tape(rows))])), 80)
    failures = {5: 3, 40: 2, 89: 1}
    assert take(iter(loader([Source("a", 1.0, patient(rows, failures, waited))], workers=workers)), 80) == sound
    assert sum(failures.values()) == len(waited)


def write(path, batches):
    """A table, a record batch at a time; .ipc is Arrow's file format, .arrow its stream."""
    if path.suffix == ".parquet":
        with pyarrow.parquet.ParquetWriter(path, batches[0].schema) as writer:
            for batch in batches:
                writer.write_table(batch)
        return
    make = pyarrow.ipc.new_file if path.stem.startswith("ipc") else pyarrow.ipc.new_stream
    with pyarrow.OSFile(str(path), "wb") as file, make(file, batches[0].schema) as writer:
        for batch in batches:
            for part in batch.to_batches() or [pyarrow.RecordBatch.from_pylist([], batch.schema)]:
                writer.write_batch(part)


def table(texts, kind=None, **columns):
    kind = kind or pyarrow.string()
    return pyarrow.table({"text": pyarrow.array(texts, pyarrow.string()).cast(kind), **columns})


def read(path, **settings):
    (source,) = build(path, **settings)
    return [row for rows in source.blocks(7) for row in rows]


EVERY_FORM = pytest.mark.parametrize("name", ["{}.parquet", "{}.arrow", "ipc-{}.arrow"])
STREAMED_OR_NOT = pytest.mark.parametrize("streaming", [False, True])


@EVERY_FORM
@STREAMED_OR_NOT
def test_a_column_that_nobody_reads_may_change_its_type_from_file_to_file(tmp_path, name, streaming):
    for i, other in enumerate(([1, 2], ["2020-01", "x"], [{"a": 1}, None], [None, None])):
        write(tmp_path / name.format(i), [table([f"a{i}", f"b{i}"], other=pyarrow.array(other))])
    write(tmp_path / name.format(4), [table(["a4", "b4"])])
    assert read(tmp_path, streaming=streaming) == [f"{x}{i}" for i in range(5) for x in "ab"]


@EVERY_FORM
@STREAMED_OR_NOT
def test_files_and_groups_without_rows_are_passed_over(tmp_path, name, streaming):
    write(tmp_path / name.format(0), [table([])])
    write(tmp_path / name.format(1), [table([]), table(["a", "b"]), table([]), table(["c"])])
    write(tmp_path / name.format(2), [table([])])
    write(tmp_path / name.format(3), [table(["d"])])
    write(tmp_path / name.format(4), [pyarrow.table({"text": pyarrow.array([], pyarrow.null())})])
    assert read(tmp_path, streaming=streaming) == list("abcd")
    with pytest.raises(UserError) as error:
        read(tmp_path / name.format(2), streaming=streaming)
    assert error.value.setting == "--training.dataset" and "no rows" in error.value.found


@EVERY_FORM
@STREAMED_OR_NOT
def test_text_of_every_arrow_type_is_text(tmp_path, name, streaming):
    dictionary = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    for i, kind in enumerate((pyarrow.string(), pyarrow.large_string(), dictionary, pyarrow.string_view())):
        write(tmp_path / name.format(i), [table(["a", None, "\u00e9"], kind)])
        assert read(tmp_path / name.format(i), streaming=streaming) == ["a", Bad("null", "row 1"), "\u00e9"], kind
    everything = [row for row in read(tmp_path, streaming=streaming) if not isinstance(row, Bad)]
    assert everything == ["a", "\u00e9"] * 4


@EVERY_FORM
@STREAMED_OR_NOT
def test_files_may_have_ids_of_other_widths_or_text_in_their_place(tmp_path, name, streaming):
    for i, (kind, values) in enumerate(((pyarrow.int8(), [[1, 2]]), (pyarrow.int64(), [[200, 70_000]]))):
        write(tmp_path / name.format(i), [pyarrow.table({"text": pyarrow.array(values, pyarrow.list_(kind))})])
    assert [row.tolist() for row in read(tmp_path, streaming=streaming)] == [[1, 2], [200, 70_000]]
    write(tmp_path / name.format(2), [table(["text"])])
    assert [str(row) for row in read(tmp_path, streaming=streaming)] == ["[1 2]", "[  200 70000]", "text"]


@EVERY_FORM
@STREAMED_OR_NOT
def test_two_columns_of_the_name_that_is_read_are_rejected(tmp_path, name, streaming):
    path = tmp_path / name.format(0)
    write(path, [pyarrow.table([["a"], ["b"]], names=["text", "text"])])
    with pytest.raises(UserError) as error:
        read(path, streaming=streaming)
    assert (error.value.setting, error.value.found) == (str(path), "2 columns 'text'")


@EVERY_FORM
@STREAMED_OR_NOT
def test_text_that_is_not_utf_8_costs_its_row_alone(tmp_path, name, streaming):
    latin = pyarrow.array([b"a", b"caf\xe9", b"c"], pyarrow.binary()).view(pyarrow.string())
    write(tmp_path / name.format(0), [pyarrow.table({"text": latin})])
    assert read(tmp_path, streaming=streaming) == ["a", Bad("invalid UTF-8", "row 1"), "c"]


@EVERY_FORM
@STREAMED_OR_NOT
@pytest.mark.parametrize(
    "values, holds",
    [
        ([{"a": "x"}], "structs"),
        ([["a"]], "lists of text"),
        ([[{"role": "user"}]], "lists of structs"),
        ([1.5], "double"),
        ([b"a"], "binary"),
        ([[0.5]], "lists of double"),
    ],
)
def test_a_column_of_anything_else_is_rejected_and_said_to_hold_it(tmp_path, name, streaming, values, holds):
    write(tmp_path / name.format(0), [pyarrow.table({"text": values})])
    with pytest.raises(UserError) as error:
        read(tmp_path, streaming=streaming)
    assert error.value.setting == "--data.column" and error.value.found.startswith(f"{holds} in column 'text'")


@EVERY_FORM
@STREAMED_OR_NOT
def test_a_file_without_the_column_is_named(tmp_path, name, streaming):
    write(tmp_path / name.format(0), [table(["a"])])
    write(tmp_path / name.format(1), [pyarrow.table({"body": ["b"]})])
    with pytest.raises(UserError) as error:
        read(tmp_path, streaming=streaming)
    assert error.value.setting == "--data.column" and name.format(1) in error.value.found


@EVERY_FORM
@STREAMED_OR_NOT
def test_a_damaged_file_is_named_at_once(tmp_path, name, streaming, caplog):
    write(tmp_path / name.format(0), [table(["a"] * 100)])
    write(tmp_path / name.format(1), [table(["a"] * 100)])
    whole = (tmp_path / name.format(1)).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"PAR1" * 9, whole[:40] + b"\xff" * 200 + whole[240:]):
        (tmp_path / name.format(1)).write_bytes(content)
        with pytest.raises(UserError) as error:
            read(tmp_path, streaming=streaming)
        assert name.format(1) in str(error.value) and "\n" not in str(error.value)
    assert "trying again" not in caplog.text


@pytest.mark.parametrize("number", [2**64 - 1, 2**63 - 1, 2**62, 2**32, 0x7F7F7F7F7F7F7F7F])
def test_a_number_damaged_anywhere_in_an_arrow_file_is_found_or_harmless(tmp_path, number):
    file = tmp_path / "a.arrow"
    with pyarrow.ipc.new_stream(file, table([]).schema) as writer:
        writer.write_table(pyarrow.table({"text": ["a", "b", None, "d"] * 4}, table([]).schema))
    whole, rejected = file.read_bytes(), 0
    for place in range(0, len(whole), 8):
        file.write_bytes(whole[:place] + number.to_bytes(8, "little") + whole[place + 8 :])
        try:
            if "text" in read_schema("arrow", str(file)).names:
                rows = open_column("arrow", str(file), "text")
                rows.texts(list(range(len(rows))))
        except UserError as error:
            assert error.setting == str(file)
            rejected += 1
    assert rejected > 20


@EVERY_FORM
@STREAMED_OR_NOT
@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_tables_are_read(tmp_path, name, streaming, ending):
    write(tmp_path / name.format(0), [table(["a", "b"])])
    plain = (tmp_path / name.format(0)).read_bytes()
    (tmp_path / name.format(0)).unlink()
    (tmp_path / f"{name.format(0)}{ending}").write_bytes(COMPRESS[ending](plain))
    assert read(tmp_path, streaming=streaming) == ["a", "b"]


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json", "dataset_dict.json"])
@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"_data_files": 5}', '{"splits": 5}', "{"])
def test_a_folder_of_save_to_disk_with_a_damaged_file_is_rejected_in_one_line(tmp_path, file, content):
    table = Dataset.from_dict({"text": ["a", "b"]})
    (DatasetDict({"train": table}) if file == "dataset_dict.json" else table).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / file).write_text(content)
    try:
        (source,) = build(tmp_path / "saved")
    except UserError as error:
        assert error.setting == "--training.dataset" and "\n" not in str(error)
    else:
        assert file == "dataset_info.json" and source.rows.texts([0, 1]) == ["a", "b"]


def test_values_of_several_types_are_told_row_by_row():
    rows = [{"text": "a"}, {"text": [1, 2]}, {"text": {"b": 1}}, {"text": None}, {"text": 5}]
    mixed = Dataset.from_list(rows, on_mixed_types="use_json")
    text, ids, *bad = TableRows(mixed, "text").texts(range(5))
    assert text == "a" and ids.tolist() == [1, 2] and [row.place for row in bad] == ["row 2", "row 3", "row 4"]


@pytest.mark.slow
def test_the_seconds_that_a_step_waited_for_data_on_any_rank_are_in_the_metrics(tmp_path):
    job = [
        *(*SMALL, f"--job.dump_folder={tmp_path / 'run'}", f"--model.config={write_config(tmp_path, 'llama')}"),
        *("--training.steps=4", "--checkpoint.no_enable"),
    ]
    train_each([job], trainer="tests.faults:SlowData", ranks=2)
    waited = [record["data/wait_seconds"] for record in metrics(tmp_path / "run")]
    assert 1 <= waited[1] < 3 and max(waited[2:]) < 1
