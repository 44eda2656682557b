"""Sources as [[data.sources]] tables of a TOML."""

import json

import pytest

from flame.config.parser import parse, recorded, to_toml
from flame.data.source import build_sources
from flame.errors import UserError
from flame.preflight.validate import check

TABLES = """
[model]
config = "model.json"

[[data.sources]]
path = "one.jsonl"
weight = 3

[[data.sources]]
path = "folder"
name = "two"
column = "body"
split = "train"
data_files = "b.jsonl"

[[data.sources]]
path = "stdlib"
weight = 0.5
"""


@pytest.fixture(autouse=True)
def files(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.json").write_text(json.dumps({"model_type": "gla", "vocab_size": 512}))
    (tmp_path / "one.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "folder" / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "folder" / "b.jsonl").write_text('{"body": "b"}\n')


def job(tmp_path, text, *flags):
    (tmp_path / "job.toml").write_text(text)
    config = parse(["--job.config_file", str(tmp_path / "job.toml"), *flags])
    check(config, 1)
    return config


def test_tables_name_sources_with_weights_columns_and_files_of_their_own(tmp_path):
    config = job(tmp_path, TABLES)
    sources = build_sources(config.training, config.data)
    assert [(s.name, s.weight) for s in sources] == [("one", 3.0), ("two", 1.0), ("stdlib", 0.5)]
    assert [s.rows.texts([0]) for s in sources[:2]] == [["one"], ["b"]]


def test_the_recorded_config_holds_the_tables_with_paths_that_hold_anywhere(tmp_path, monkeypatch):
    config = job(tmp_path, TABLES)
    again = job(tmp_path, to_toml(config))
    assert again.data == config.data
    kept = job(tmp_path, to_toml(recorded(config)))
    monkeypatch.chdir("/")
    assert [s.path for s in kept.data.sources] == [f"{tmp_path}/one.jsonl", f"{tmp_path}/folder", "stdlib"]
    assert len(build_sources(kept.training, kept.data)) == 3


@pytest.mark.parametrize(
    "before, after, said",
    [
        ("weight = 3", "wieght = 3", "data.sources[0].wieght: not a setting, did you mean weight?"),
        ("weight = 3", "flavour = 3", "data.sources[0].flavour: not a setting, the settings are path, name"),
        ("weight = 3", 'weight = "3"', "data.sources[0].weight: found '3', must be a number"),
        ("weight = 3", "weight = 0", "data.sources[0].weight: found 0.0, must be a number above 0"),
        ('path = "folder"', "", "data.sources[1] needs a value for path"),
        ('path = "folder"', 'path = "fodler.jsonl"', "data.sources[1].path: there is no fodler.jsonl"),
        ("b.jsonl", "c.jsonl", "data.sources[1].data_files: there is no c.jsonl"),
        ("weight = 0.5", 'name = "two"', "data.sources[1].name: found 'two' twice"),
        ("[model]", '[training]\ndataset = "one.jsonl"\n[model]', "--training.dataset: the sources are in"),
        ("[model]", '[training]\ndata_probs = "1"\n[model]', "--training.data_probs: the sources are in"),
        ("[[data.sources]]", "[data.sources]", None),
    ],
)
def test_a_mistake_in_a_table_is_said_in_one_line(tmp_path, before, after, said):
    with pytest.raises(UserError) as caught:
        job(tmp_path, TABLES.replace(before, after))
    assert (said or "TOML") in str(caught.value) and "\n" not in str(caught.value)
