"""A config.toml in a run folder means that folder, wherever it was moved or copied to."""

import os
import shutil

import pytest

from flame.config.parser import parse, recorded, to_toml


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run that records its own place."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "exp" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(recorded(parse([f"--job.dump_folder={folder}", "--training.steps=7"]))))
    (folder / "status.json").write_text("{}")
    return folder


def folder_of(file, *flags):
    return parse(["--job.config_file", str(file), *flags]).job.dump_folder


def test_a_moved_run_goes_on_where_it_is_and_a_copied_one_is_a_run_of_its_own(run, tmp_path, caplog):
    assert folder_of(run / "config.toml") == str(run) and not caplog.messages
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert folder_of(copy / "config.toml") == folder_of("copy/config.toml") == str(copy)
    moved = run.rename(tmp_path / "moved")
    assert folder_of(moved / "config.toml") == str(moved)
    assert len(caplog.messages) == 3 and str(run) in caplog.messages[0] and str(copy) in caplog.messages[0]


def test_a_folder_named_by_a_flag_is_meant(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    for flags in (["--job.dump_folder=other"], ["--job.dump-folder", "other"]):
        assert folder_of("copy/config.toml", *flags) == "other"


def test_the_same_folder_by_another_path_is_not_another_run(run, tmp_path, monkeypatch, caplog):
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "job.toml").symlink_to(run / "config.toml")
    for file in ("link/config.toml", "exp/../exp/mine/config.toml", "job.toml", "~/mine/config.toml"):
        monkeypatch.setenv("HOME", str(tmp_path / "exp"))
        assert folder_of(file) == str(run), file
    monkeypatch.chdir(run)
    assert folder_of("config.toml") == str(run) and not caplog.messages


def test_a_link_to_the_config_of_a_moved_run_means_that_run(run, tmp_path):
    moved = run.rename(tmp_path / "moved")
    (tmp_path / "config.toml").symlink_to(moved / "config.toml")
    assert folder_of("config.toml") == str(moved)


def test_a_job_file_that_is_not_the_record_of_a_run_means_what_it_says(run, tmp_path):
    (tmp_path / "jobs").mkdir()
    shutil.copy(run / "config.toml", tmp_path / "jobs" / "config.toml")  # no run beside it
    assert folder_of("jobs/config.toml") == str(run)
    shutil.copy(run / "config.toml", run / "again.toml")
    (run / "config.toml").write_text('[job]\ndump_folder = "elsewhere"\n')
    assert folder_of(run / "config.toml") == "elsewhere"
    assert os.path.samefile(folder_of(run / "again.toml"), run)
