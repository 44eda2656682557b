"""A new folder appears whole or not at all."""

import subprocess
import sys

import pytest

from flame.convert.output import new_folder
from tests.launch import environment

MAKER = """
import sys
from pathlib import Path
from flame.convert.output import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "first").touch()
    print("begun", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def maker(tmp_path):
    """A process that is making the folder tmp_path/hf."""
    command = [sys.executable, "-c", MAKER, str(tmp_path / "hf")]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, env=environment(), text=True, **streams)
    assert process.stdout.readline() == "begun\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_of_two_processes_that_make_a_folder_is_rejected_and_disturbs_nothing(maker, tmp_path):
    with new_folder(tmp_path / "hf") as folder:
        (folder / "second").touch()
    _, text = maker.communicate()
    assert "flame.errors.UserError: " in text and "hf: another process made it meanwhile" in text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["hf", "second"]


def test_the_remains_of_a_killed_process_are_deleted(maker, tmp_path):
    maker.kill()
    maker.wait()
    (left,) = tmp_path.iterdir()
    assert list(left.rglob("first"))
    with new_folder(tmp_path / "hf"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_failure_leaves_none_of_the_new_folders_above_it(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a" / "b" / "hf"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
