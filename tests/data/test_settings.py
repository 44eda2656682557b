"""The data settings: sources as [[data.sources]] tables or as comma lists, lanes, skipped steps."""

import json

import pytest

from flame.config.parser import parse, recorded, to_toml
from flame.config.schema import Data, DataSource, Training
from flame.data.settings import check_lanes, parse_skip, parse_sources
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
    "before, after, setting, rule",
    [
        ('path = "folder"', 'path = ""', "data.sources[1].path", "a hub id"),
        ("weight = 3", "weight = 0", "data.sources[0].weight", "found 0.0, must be a number above 0"),
        ("weight = 3", "weight = 1e308", "data.sources[0].weight", "below 1e100"),
        ("weight = 0.5", r'name = "two\nlines"', "data.sources[2].name", "printable"),
        ('path = "folder"', 'path = "fodler.jsonl"', "data.sources[1].path", "no file or folder fodler.jsonl"),
        ("b.jsonl", "c.jsonl", "data.sources[1].data_files", "no file c.jsonl"),
        ("weight = 0.5", 'name = "two"', "data.sources[1].name", "'two' twice"),
        ("[model]", '[training]\ndataset = "one.jsonl"\n[model]', "--training.dataset", "only one of the two"),
        ("[model]", '[training]\ndata_probs = "1"\n[model]', "--training.data_probs", "only one of the two"),
    ],
)
def test_a_mistake_in_a_table_names_its_key(tmp_path, before, after, setting, rule):
    with pytest.raises(UserError) as error:
        job(tmp_path, TABLES.replace(before, after))
    assert error.value.setting == setting and rule in str(error.value)


@pytest.mark.parametrize(
    "before, after, words",
    [
        ("weight = 3", "wieght = 3", ["data.sources[0].wieght", "weight?"]),
        ("weight = 3", "flavour = 3", ["data.sources[0].flavour", "path, name"]),
        ("weight = 3", 'weight = "3"', ["data.sources[0].weight", "number"]),
        ('path = "folder"', "", ["data.sources[1]", "path"]),
        ("[[data.sources]]", "[data.sources]", ["TOML"]),
    ],
)
def test_a_table_that_cannot_be_parsed_is_rejected_in_one_line(tmp_path, before, after, words):
    with pytest.raises(UserError) as error:
        job(tmp_path, TABLES.replace(before, after))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_names_the_key_of_its_table(tmp_path):
    config = job(tmp_path, TABLES.replace('column = "body"', 'column = "text"'))
    with pytest.raises(UserError) as error:
        build_sources(config.training, config.data)
    assert error.value.setting == "data.sources[1].column" and error.value.allowed == "one of body"


def lists(**training):
    return parse_sources(Training(**training), Data(column="body"))


def test_comma_lists_are_aligned():
    one, two = lists(dataset="a.jsonl, stdlib", dataset_name="x,", dataset_split=",few", data_probs="0.7,0.3")
    assert one == DataSource("a.jsonl", name="a-x", weight=0.7, column="body", subset="x")
    assert two == DataSource("stdlib", name="stdlib", weight=0.3, column="body", split="few")
    assert [source.weight for source in lists(dataset="a,b")] == [1.0, 1.0]
    assert lists(dataset="a", data_files="b.jsonl,c.jsonl")[0].data_files == "b.jsonl,c.jsonl"


@pytest.mark.parametrize(
    "training, flag, rule",
    [
        ({"dataset": "a,"}, "dataset", "every item"),
        ({"dataset": "a,b", "dataset_name": "x"}, "dataset_name", "found 1 items, must be one item for each of 2"),
        ({"dataset": "a,b", "data_probs": "1,2,3"}, "data_probs", "found 3 items, must be one item for each of 2"),
        ({"dataset": "a,b", "data_probs": "1,x"}, "data_probs", "found 1,x, must be a number above 0"),
        ({"dataset": "a,b", "data_probs": "1,0"}, "data_probs", "found 0.0, must be a number above 0"),
        ({"dataset": "a,b", "data_probs": "0.5,"}, "data_probs", "found 0.5,, must be a number above 0"),
        ({"dataset": "a,b", "data_probs": "0.5,0.4"}, "data_probs", "found a sum of 0.9, must be shares that sum to 1"),
    ],
)
def test_comma_lists_that_do_not_fit_together_are_rejected(training, flag, rule):
    with pytest.raises(UserError) as error:
        lists(**training)
    assert error.value.setting == f"--training.{flag}" and rule in str(error.value)


def test_names_are_short_unique_and_do_not_depend_on_what_follows():
    paths = ("x/z.jsonl.gz", "x/folder/*.jsonl", "x/folder", "*.txt", "stdlib")
    assert [source.name for source in lists(dataset=",".join(paths))] == ["z", "folder", "folder-2", "data", "stdlib"]
    tables = [DataSource("two.jsonl"), DataSource("one", name="two"), DataSource("two.txt")]
    assert [source.name for source in parse_sources(Training(), Data(sources=tables))] == ["two-2", "two", "two-3"]


@pytest.mark.parametrize(
    "data, dp_degree, setting, rule",
    [
        ({"lanes": 0}, 1, "--data.lanes", "found 0, must be 1 or more"),
        ({"window": 0}, 1, "--data.window", "found 0, must be 1 or more"),
        ({"lanes": 8}, 3, "--data.lanes", "multiple of the 3 data-parallel ranks: 6 or 9 would work"),
        ({"lanes": 2}, 3, "--data.lanes", ": 3 would work"),
    ],
)
def test_lanes_that_the_ranks_cannot_share_are_rejected(data, dp_degree, setting, rule):
    with pytest.raises(UserError) as error:
        check_lanes(Data(**data), dp_degree)
    assert error.value.setting == setting and rule in str(error.value)
    check_lanes(Data(), 64)


@pytest.mark.parametrize(
    "text, ranges",
    [
        (None, []),
        ("", []),
        ("400", [(400, 400)]),
        ("120-135,400", [(120, 135), (400, 400)]),
        (" 9 , 3 - 5,6", [(3, 6), (9, 9)]),
        ("1-10,3-4", [(1, 10)]),
    ],
)
def test_ranges_of_steps_are_read_in_any_order_and_merged(text, ranges):
    assert parse_skip(text) == ranges


@pytest.mark.parametrize("text", ["0", "0-3", "5-4", "a", "3-", "-3", "1,,2", "1.5", "3:5", ","])
def test_what_is_not_a_range_of_steps_is_rejected_before_the_start(text):
    with pytest.raises(UserError) as error:
        check(parse([f"--data.skip={text}"]), 1)
    assert error.value.setting == "--data.skip" and "120-135,400" in error.value.allowed
