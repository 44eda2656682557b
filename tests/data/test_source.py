"""What --training.dataset can name, and the errors of what cannot be read."""

import gzip
import json

import pyarrow
import pytest
from datasets import Dataset, DatasetDict

from flame.errors import UserError
from tests.data.fakes import build, loader, take

TEXTS = [f"document {i}\nsecond line" for i in range(40)]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """The same 40 documents in every form."""
    root = tmp_path_factory.mktemp("shelf")
    table = Dataset.from_dict({"text": TEXTS, "id": list(range(40))})
    for folder in ("folder", "texts"):
        (root / folder).mkdir()
    table.to_parquet(root / "t.parquet")
    with pyarrow.OSFile(str(root / "t.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.data.schema) as writer:
        writer.write_table(table.data.table)
    (root / "tables").mkdir()
    table.select(range(25)).to_parquet(root / "tables" / "part-0.parquet")
    table.select(range(25, 40)).to_parquet(root / "tables" / "part-1.parquet")
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (root / "j.jsonl").write_text("".join(lines))
    (root / "folder" / "part-0.jsonl").write_text("".join(lines[:25]))
    (root / "folder" / "part-1.jsonl").write_text("".join(lines[25:]))
    with gzip.open(root / "z.jsonl.gz", "wt") as file:
        file.writelines(lines)
    (root / "lines.json").write_text("".join(lines))
    with pyarrow.output_stream(str(root / "lines.json.zst"), compression="zstd") as file:
        file.write("".join(lines).encode())
    (root / "array.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    for i, text in enumerate(TEXTS):
        (root / "texts" / f"{i:02d}.txt").write_text(text)
    table.save_to_disk(root / "saved")
    DatasetDict({"train": table, "few": table.select(range(5))}).save_to_disk(root / "splits")
    (root / "content.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in TEXTS))
    (root / "other.jsonl").write_text(json.dumps({"body": "b", "number": 1}) + "\n")
    (root / "empty").mkdir()
    table.select([]).save_to_disk(root / "no rows")
    (root / "broken.json").write_text('{"text": ')
    (root / "none.jsonl").write_text("")
    (root / "table.csv").write_text("text\na\n")
    return root


def read(source):
    if source.streamed:
        return [text for batch, _ in source.rows.batches(16) for text in batch]
    return source.rows.texts(list(range(len(source.rows))))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "path",
    [
        "t.parquet",
        "t.arrow",
        "j.jsonl",
        "folder",
        "folder/*.jsonl",
        "z.jsonl.gz",
        "lines.json",
        "lines.json.zst",
        "array.json",
        "texts",
        "texts/*.txt",
        "saved",
        "splits",
        "content.jsonl",
    ],
)
def test_every_form_gives_the_same_documents(shelf, path, streaming):
    (source,) = build(shelf / path, streaming=streaming)
    assert sorted(read(source)) == sorted(TEXTS)
    assert set(source.sample(7)) <= set(TEXTS) and len(source.sample(7)) == 7


def test_a_split_a_slice_of_one_and_files_inside_a_folder_can_be_named(shelf):
    assert len(build(shelf / "splits", dataset_split="few")[0].rows) == 5
    assert len(build(shelf / "j.jsonl", dataset_split="train[:10]")[0].rows) == 10
    assert len(build(shelf / "folder", data_files="part-1.jsonl")[0].rows) == 15
    assert len(build(shelf / "folder", data_files="part-0.jsonl, part-1.jsonl")[0].rows) == 40
    assert len(build("json", data_files=str(shelf / "j.jsonl"))[0].rows) == 40


def test_rows_come_by_index(shelf):
    (source,) = build(shelf / "t.parquet")
    assert source.rows.texts([31, 2, 2]) == [TEXTS[31], TEXTS[2], TEXTS[2]]


def test_the_standard_library_is_read_in_place():
    (source,) = build("stdlib")
    texts = source.rows.texts(range(len(source.rows)))
    assert source.name == "stdlib" and len(texts) > 500
    assert any("class ArgumentParser" in text for text in texts)
    assert not any("site-packages" in str(path) for path in source.rows._files)


@pytest.mark.parametrize("path", ["t.parquet", "tables"])
def test_a_stream_continues_from_its_mark_in_this_and_the_next_epoch(shelf, path):
    (source,) = build(shelf / path, streaming=True)
    whole = list(source.rows.batches(7))
    assert [len(batch) for batch, _ in whole] == [7, 7, 7, 7, 7, 5]
    for k, (_, mark) in enumerate(whole[:-1]):
        mark = json.loads(json.dumps(mark))
        assert len(json.dumps(mark)) < 700
        rest = list(source.rows.batches(7, mark))
        assert [batch for batch, _ in rest] == [batch for batch, _ in whole[k + 1 :]]
        for later, (_, again) in enumerate(rest[:-1]):  # a resumed stream's own marks
            batches = [batch for batch, _ in source.rows.batches(7, json.loads(json.dumps(again)))]
            assert batches == [batch for batch, _ in rest[later + 1 :]], (k, later)
        assert list(source.rows.batches(7)) == whole, "an epoch after a resumed one is a whole one"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_mixture_resumes_on_other_ranks_past_windows_and_epochs(shelf, workers):
    def run(rank, world, state=None):
        paths = f"{shelf / 'tables'},{shelf / 't.parquet'},{shelf / 'texts'}"
        made = loader(build(paths, streaming=True), rank, world, batch=8 // world, workers=workers)
        if state:
            made.load_state_dict(state)
        return made, iter(made)

    one, reader = run(0, 1)
    rows = [batch["input"] for batch in take(reader, 10)]
    state = json.loads(json.dumps(one.state_dict()))
    rest = [batch["input"] for batch in take(reader, 30)]
    reader.close()
    assert min(place.epoch for place in one._states[0].places) >= 1 and len(rows) == 10
    pair = [run(rank, 2, state)[1] for rank in range(2)]
    for expected in rest:
        first, second = (take(iterator, 1)[0]["input"] for iterator in pair)
        assert [row for both in zip(first, second, strict=True) for row in both] == expected
    for iterator in pair:
        iterator.close()
    assert max(len(value) for key, value in state.items() if key.startswith("lane")) < 2048


@pytest.mark.parametrize(
    "settings, flag, rule",
    [
        ({"dataset": "{}/nowhere.jsonl"}, "dataset", "no file or folder"),
        ({"dataset": "{}/*.nothing"}, "dataset", "no file or folder"),
        ({"dataset": "{}/empty"}, "dataset", "no files to read"),
        ({"dataset": "{}/none.jsonl"}, "dataset", "no rows"),
        ({"dataset": "{}/broken.json"}, "{}/broken.json", "not valid JSON"),
        ({"dataset": "{}/j.jsonl", "dataset_split": "test"}, "dataset_split", "one of train"),
        ({"dataset": "{}/splits", "dataset_split": "test"}, "dataset_split", "one of train, few"),
        ({"dataset": "{}/j.jsonl", "dataset_split": "train[:0]"}, "dataset", "no rows"),
        ({"dataset": "{}/j.jsonl", "dataset_split": "train[x]"}, "dataset_split", "'train[x]', must be"),
        ({"dataset": "{}/j.jsonl", "dataset_split": "train+"}, "dataset_split", "'train+', must be"),
        ({"dataset": "{}/j.jsonl", "dataset_split": "train[:200%]"}, "dataset_split", "'train[:200%]', must be"),
        ({"dataset": "{}/j.jsonl", "data_files": "z.jsonl.gz"}, "data_files", "found z.jsonl.gz, must be none"),
        ({"dataset": "{}/*.jsonl", "data_dir": "folder"}, "data_dir", "found folder, must be none"),
        ({"dataset": "{}/j.jsonl", "dataset_name": "en"}, "dataset_name", "found en, must be none"),
        ({"dataset": "{}/saved", "data_files": "*.arrow"}, "data_files", "found *.arrow, must be none"),
        ({"dataset": "stdlib", "dataset_split": "test"}, "dataset_split", "found test, must be none"),
        ({"dataset": "{}/folder", "data_files": "part-0.jsonl,"}, "data_files", "none of them empty"),
        ({"dataset": "{}/no rows"}, "dataset", "no rows in"),
        ({"dataset": "https://localhost/a.jsonl"}, "dataset", "a local path or a hub id"),
        ({"dataset": "{}/*.csv"}, "dataset", ".jsonl"),
        ({"dataset": "nobody/nothing-of-this-name"}, "dataset", "HF_HUB_OFFLINE is set"),
        ({"dataset": "nobody/nothing-of-this-name", "streaming": True}, "dataset", "HF_HUB_OFFLINE is set"),
        ({"dataset": "{}/other.jsonl"}, "--data.column", "one of body"),
        ({"dataset": "{}/j.jsonl", "column": "body"}, "--data.column", "no column 'body'"),
        ({"dataset": "{}/other.jsonl", "column": "number"}, "--data.column", "numbers in column 'number'"),
    ],
)
def test_what_cannot_be_read_is_rejected_in_one_line(shelf, settings, flag, rule):
    settings = {k: v.replace("{}", str(shelf)) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(UserError) as error:
        build(**settings)
    assert error.value.setting.removeprefix("--training.") == flag.replace("{}", str(shelf))
    assert rule in str(error.value) and "\n" not in str(error.value)
