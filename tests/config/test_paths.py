from pathlib import Path

import pytest

from flame.config.paths import ending, exists, is_local


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("folder").mkdir()
    Path("folder/a.jsonl").touch()


@pytest.mark.parametrize("path", ["folder", "~/folder", "folder/*.jsonl", "**/a.jsonl"])
def test_a_path_or_pattern_that_names_something_exists(path):
    assert exists(path) and not exists(path.replace("a", "b").replace("fo", "fa"))


@pytest.mark.parametrize("name", ["x" * 5000, ""])
def test_a_name_that_no_file_can_have_does_not_exist(name):
    assert not exists(name)


@pytest.mark.parametrize(
    "name, local",
    [
        *[(name, True) for name in ("./x", "../x", "/x", "~/x", "a/b/c", "x.parquet", "x.json.gz", "folder", "gone/*")],
        *[(name, True) for name in ("data/mine.csv", "nope.JSON", "data/notes.md", "weights/model.safetensors")],
        *[(name, False) for name in ("allenai/c4", "gpt2", "hf://x/y.json", "")],
    ],
)
def test_paths_and_hub_ids_are_told_apart(name, local):
    assert is_local(name) is local


@pytest.mark.parametrize("file, last", [("a.jsonl", ".jsonl"), ("x/a.b.json.gz", ".json"), ("a.zst", ""), ("a", "")])
def test_the_ending_of_a_compressed_file_is_that_of_its_content(file, last):
    assert ending(file) == last
