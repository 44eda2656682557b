"""A new folder appears whole or not at all."""

import signal
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


KILLED = """
import os, signal, sys
from pathlib import Path
from flame.convert.output import new_folder
def kill(event, arguments):
    if event == sys.argv[2] and ".tmp" in str(arguments):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "first").touch()
"""


@pytest.mark.parametrize("moment", ["open", "os.rename", "shutil.rmtree"])
def test_what_a_process_killed_at_any_moment_leaves_is_deleted_by_any_conversion_beside(moment, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "hf"), moment], env=environment())
    assert done.returncode == -signal.SIGKILL
    kept = [path for path in tmp_path.iterdir() if path.name == "hf"]
    assert len(list(tmp_path.iterdir())) == len(kept) + 1
    for name in (".hf.mine.tmp", ".hf.elsewhere-abcdefgh.tmp"):
        (tmp_path / name).mkdir()
        kept.append(tmp_path / name)
    with new_folder(tmp_path / "other"):
        pass
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "other"])


def test_a_failure_leaves_none_of_the_new_folders_above_it(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a" / "b" / "hf"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
