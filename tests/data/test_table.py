import json
from types import SimpleNamespace

import pytest

from flame.data.source import build_sources
from flame.errors import UserError


def job(path, **fields):
    training = dict.fromkeys(("dataset_name", "dataset_split", "data_dir", "data_files", "data_probs"))
    training |= {"dataset": str(path), "streaming": False} | fields
    data = SimpleNamespace(column=None, sources=[], max_bad_rows=0.01, epochs=0)
    return SimpleNamespace(**training), data


@pytest.fixture
def mixed(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "rows"}) + "\n")
    (tmp_path / "b.txt").write_text("a document")
    return tmp_path


def test_a_folder_of_several_kinds_is_refused_rather_than_half_read(mixed):
    with pytest.raises(UserError, match=r"several kinds \(json, text\); choose with --training.data_files"):
        build_sources(*job(mixed))


def test_of_several_kinds_one_may_be_chosen(mixed):
    (source,) = build_sources(*job(mixed, data_files="*.jsonl"))
    assert source.rows.texts([0]) == ["rows"]


def test_a_file_without_a_row_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"empty.jsonl.*no rows"):
        build_sources(*job(tmp_path / "empty.jsonl"))
