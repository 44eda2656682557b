"""Which files a source names: every form of a name, everything in a folder, splits only where somebody names them."""

import json
import os

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from flame.config.parser import parse
from flame.config.paths import exists
from flame.config.schema import DataSource
from flame.data.document import Bad
from flame.data.listing import expand, list_files
from flame.errors import UserError
from flame.preflight.inputs import check_data
from tests.data.fakes import build, loader, take
from tests.data.test_megatron import pair


def write(path, *texts):
    """A file of documents, of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), path)
    elif path.suffix == ".txt":
        path.write_text(*texts)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def read(path, **settings):
    """All documents of a source in their order; ids as lists."""
    (source,) = build(path, **settings)
    rows = [row for rows in source.blocks(64) for row in rows]
    assert not any(isinstance(row, Bad) for row in rows)
    return [row if isinstance(row, str) else row.tolist() for row in rows]


def left_out(path, **settings):
    return [os.path.relpath(file, path) for file in build(path, **settings)[0].left_out]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["jsonl", "json", "txt", "parquet"])
def test_a_folder_means_all_its_files_whatever_their_names(tmp_path, ending, streaming):
    names = ("books", "my-test", "train_extra", "validation/part", "train/part")
    for name in names:
        write(tmp_path / f"{name}.{ending}", name)
    assert sorted(read(tmp_path, streaming=streaming)) == sorted(names)
    assert left_out(tmp_path, streaming=streaming) == []


def test_a_split_that_the_user_names_is_read_and_the_other_files_are_named(tmp_path):
    for name in ("books", "train_extra", "my_train", "dev"):
        write(tmp_path / f"{name}.jsonl", name)
    assert sorted(read(tmp_path, dataset_split="train")) == ["my_train", "train_extra"]
    assert left_out(tmp_path, dataset_split="train") == ["books.jsonl", "dev.jsonl"]
    assert read(tmp_path, dataset_split="validation") == ["dev"]
    assert len(read(tmp_path, dataset_split="all")) == 4
    with pytest.raises(UserError) as error:
        build(tmp_path, dataset_split="test")
    assert (error.value.setting, error.value.found) == ("--training.dataset_split", "test")
    assert error.value.allowed.startswith("one of train, validation")


def test_files_of_one_split_keep_the_order_that_datasets_gives_them(tmp_path):
    for name in ("a_train", "train-1", "train-0"):
        write(tmp_path / f"{name}.jsonl", name)
    assert read(tmp_path) == read(tmp_path, dataset_split="train") == ["train-0", "train-1", "a_train"]


def test_the_splits_of_a_dataset_card_are_those_of_the_source(tmp_path):
    for name in ("one", "two", "train"):
        write(tmp_path / f"{name}.jsonl", name)
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: one*\n  - split: rest\n"
    (tmp_path / "README.md").write_text(card + "    path: two*\n---\n# Title\n")
    assert read(tmp_path) == ["one"] and left_out(tmp_path) == ["train.jsonl", "two.jsonl"]
    assert read(tmp_path, dataset_split="rest") == ["two"]
    (tmp_path / "README.md").write_text("---\nconfigs: [}\n---\n")
    with pytest.raises(UserError) as error:
        build(tmp_path)
    assert error.value.setting == f"{tmp_path}/README.md" and "\n" not in str(error.value)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nconfigs:\n")
    assert len(read(tmp_path)) == 3 and left_out(tmp_path) == []


def test_files_behind_links_are_read_and_loops_of_links_are_not_followed(tmp_path):
    write(tmp_path / "real" / "part" / "b.jsonl", "b")
    write(tmp_path / "data" / "a.jsonl", "a")
    (tmp_path / "data" / "linked").symlink_to("../real/part")
    (tmp_path / "data" / "file.jsonl").symlink_to("../real/part/b.jsonl")
    (tmp_path / "data" / "loop").symlink_to(".")
    (tmp_path / "real" / "part" / "up").symlink_to("../../data")
    for path in ("data", "data/**", "data/**/*.jsonl", "data/../data/**/*.jsonl"):
        assert exists(str(tmp_path / path)) and sorted(read(tmp_path / path)) == ["a", "b", "b"], path
    assert read(tmp_path / "data" / "linked" / "b.jsonl") == ["b"]


def test_hidden_files_and_folders_do_not_count(tmp_path):
    write(tmp_path / "data.jsonl", "seen")
    for name in (".note.txt", ".cache/x.json", ".ipynb_checkpoints/a.txt", "__MACOSX/._data.jsonl", "__MACOSX/d.txt"):
        write(tmp_path / name, "hidden")
    assert read(tmp_path) == read(tmp_path / "*") == ["seen"]
    assert left_out(tmp_path) == []
    assert read(tmp_path / ".cache") == ["hidden"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["jsonl", "txt", "parquet"])
@pytest.mark.parametrize("folder", ["brackets[1]", "star*", "what?", "{ab}", "a b", "gr\u00fcn"])
def test_names_that_look_like_patterns_are_names_where_they_are_there(tmp_path, folder, ending, streaming):
    write(tmp_path / folder / f"[x].{ending}", "in it")
    write(tmp_path / "brackets1" / f"x.{ending}", "not in it")
    for path in (folder, f"{folder}/[x].{ending}"):
        assert read(tmp_path / path, streaming=streaming) == ["in it"]
    for files in (f"[x].{ending}", f"*.{ending}"):
        assert read(tmp_path / folder, data_files=files, streaming=streaming) == ["in it"]
        job = parse([f"--training.dataset={tmp_path / folder}", f"--training.data_files={files}"])
        check_data(job.training, job.data)


@pytest.mark.parametrize("streaming", [False, True])
def test_each_file_of_a_mixed_folder_is_read_by_its_own_kind(tmp_path, streaming):
    write(tmp_path / "b.jsonl", "lines 1", "lines 2")
    write(tmp_path / "a.txt", "a file\n{of}\n\nlines")
    write(tmp_path / "sub" / "c.parquet", "table")
    (tmp_path / "array.json").write_text('[{"text": "item"},\n {"text": "item 2"}]')
    pair(tmp_path)
    for name in ("lone.bin", "other.idx", "table.csv", "README.md"):
        (tmp_path / name).write_bytes(b"x")
    ids = [[1, 2, 3], [300], [5, 6]]
    texts = ["a file\n{of}\n\nlines", "item", "item 2", "lines 1", "lines 2", "table"]
    assert sorted(read(tmp_path, streaming=streaming), key=str) == sorted([*texts, *ids], key=str)
    assert left_out(tmp_path) == ["lone.bin", "other.idx", "table.csv"]
    source = build(tmp_path)[0]
    every = source.rows.texts(list(range(len(source.rows))))
    assert [str(row) for row in source.rows.texts([8, 0, 4, 0])] == [str(every[i]) for i in (8, 0, 4, 0)]


def test_data_files_read_files_as_a_pattern_does(tmp_path):
    write(tmp_path / "part" / "a.jsonl", "line 1", "line 2")
    write(tmp_path / "part" / "deep" / "a.txt", "one\n\ndocument")
    pair(tmp_path)
    for files, expected in {
        "part/*.jsonl": ["line 1", "line 2"],
        "**/*.txt": ["one\n\ndocument"],
        "part/deep/*.txt,part/a.jsonl": ["one\n\ndocument", "line 1", "line 2"],
        "part": ["line 1", "line 2", "one\n\ndocument"],
        "x": [[1, 2, 3], [300], [5, 6]],
        "x.bin": [[1, 2, 3], [300], [5, 6]],
        "part/a.jsonl,part/*.jsonl,part/a.jsonl,x.bin,./x": ["line 1", "line 2", [1, 2, 3], [300], [5, 6]],
        f"{tmp_path}/part/*.jsonl": ["line 1", "line 2"],
    }.items():
        assert sorted(read(tmp_path, data_files=files), key=str) == sorted(expected, key=str), files
    assert read(tmp_path, data_dir="part/deep") == ["one\n\ndocument"]
    assert read("text", data_files=f"{tmp_path}/part/*/*.txt") == ["one\n\ndocument"]
    with pytest.raises(UserError) as error:
        build(tmp_path, data_files="*.csv")
    assert error.value.setting == "--training.dataset"


def test_slices_are_those_of_datasets_over_all_kinds_and_splits(tmp_path):
    write(tmp_path / "train.jsonl", *"abcdefgh")
    write(tmp_path / "train.txt", "text")
    write(tmp_path / "test.parquet", *"xyz")
    assert read(tmp_path, dataset_split="train[:2]") == ["a", "b"]
    assert read(tmp_path, dataset_split="train[-2:]+test[:2]") == ["h", "text", "x", "y"]
    assert read(tmp_path / "train.jsonl", dataset_split="train[25%:50%]", streaming=True) == ["c", "d"]
    assert read(tmp_path / "test.parquet", dataset_split="train[1:]", streaming=True) == ["y", "z"]


def test_a_link_to_nothing_and_what_is_no_file_are_rejected(tmp_path):
    write(tmp_path / "a.jsonl", "a")
    (tmp_path / "b.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(UserError) as error:
        build(tmp_path)
    assert error.value.found == f"{tmp_path}/b.jsonl"
    (tmp_path / "b.jsonl").unlink()
    os.mkfifo(tmp_path / "c.jsonl")
    with pytest.raises(UserError) as error:
        build(tmp_path)
    assert error.value.found == f"{tmp_path}/c.jsonl"


def test_endings_in_capitals_count(tmp_path):
    write(tmp_path / "A.JSONL", "a")
    write(tmp_path / "B.Txt.GZ", "b")
    assert list_files(DataSource(str(tmp_path)), None).files == {
        "json": [f"{tmp_path}/A.JSONL"],
        "text": [f"{tmp_path}/B.Txt.GZ"],
    }


def test_a_name_that_is_not_utf_8_is_read_and_shuffled_like_any_other(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(folder)
    for name, content in ((b"\xff.jsonl", b'{"text": "line"}\n'), (b"\xfe.txt", b"text")):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    assert read(os.fsdecode(folder)) == ["text", "line"]
    run = loader(build(os.fsdecode(folder)), lanes=1, seq_len=9)
    assert "text" in bytes(token % 256 for token in take(iter(run), 1)[0]["input"][0]).decode()
    json.dumps(run.state_dict())


def test_folders_that_save_to_disk_wrote_are_read_together_and_a_state_json_of_another_kind_is_data(tmp_path):
    for name in ("a", "b"):
        Dataset.from_dict({"text": [name]}).save_to_disk(tmp_path / "saved" / name)
    assert read(tmp_path / "saved") == ["a", "b"]
    write(tmp_path / "mine" / "c.jsonl", "c")
    (tmp_path / "mine" / "state.json").write_text('{"text": "a state"}')
    assert read(tmp_path / "mine") == ["c", "a state"]


def test_a_pattern_without_files_names_none(tmp_path):
    assert expand(str(tmp_path / "*.jsonl")) == []
    (tmp_path / "empty").mkdir()
    assert expand("empty", tmp_path) == []
