"""One run at a time in a run folder: a second start is rejected in one line, and a killed run excludes nobody."""

import os
import re
import resource
import signal
import subprocess
import sys

import pytest

from flame.errors import REFUSED, UserError
from flame.runtime.lock import NAME, check_free, hold
from tests.launch import REPO, environment

HOLDER = """
import sys, time
from pathlib import Path
from flame.runtime.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
CROWD = """
import os, sys
from pathlib import Path
from flame.errors import UserError
from flame.runtime.lock import hold
folder, held = Path(sys.argv[1]), 0
while held < 30:
    try:
        with hold(folder):
            os.close(os.open(f"{folder}.alone", os.O_CREAT | os.O_EXCL))
            os.unlink(f"{folder}.alone")
            held += 1
    except UserError:
        pass
"""


def start(program, folder):
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def run(tmp_path):
    """A process that holds the folder tmp_path/run."""
    process = start(HOLDER, tmp_path / "run")
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_start_is_told_who_holds_the_folder_and_changes_nothing(run, tmp_path):
    folder = tmp_path / "run"
    before = (folder / NAME).read_text()
    host = re.escape(os.uname().nodename)
    for ask in (check_free, lambda folder: hold(folder).__enter__()):
        with pytest.raises(UserError) as caught:
            ask(folder)
        assert caught.value.setting == "--job.dump_folder"
        assert re.fullmatch(rf"{folder}, .*\({host}, process {run.pid}, since 20\d\d-.*\)", caught.value.found)
    assert (folder / NAME).read_text() == before and len(list(folder.iterdir())) == 1


def test_a_folder_is_free_after_its_run_however_it_ended(run, tmp_path):
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert (tmp_path / "run" / NAME).exists()
    check_free(tmp_path / "run")
    with hold(tmp_path / "run"):
        assert f"process {os.getpid()}," in (tmp_path / "run" / NAME).read_text()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_that_is_rejected_leaves_no_new_folder(tmp_path):
    with pytest.raises(ValueError), hold(tmp_path / "new"):
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    check_free(tmp_path / "new")
    with hold(tmp_path / "new"):
        (tmp_path / "new" / "metrics.jsonl").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["metrics.jsonl"]


def test_a_run_whose_lock_was_deleted_leaves_that_of_the_next_one_alone(tmp_path):
    with hold(tmp_path / "run"):
        (tmp_path / "run" / NAME).unlink()
        second = start(HOLDER, tmp_path / "run")
        assert second.stdout.readline() == "held\n"
    try:
        with pytest.raises(UserError, match=f"process {second.pid},"):
            check_free(tmp_path / "run")
    finally:
        second.communicate()
    assert second.returncode == 0 and not (tmp_path / "run" / NAME).exists()


def test_a_lock_that_cannot_be_written_is_rejected_and_removed(tmp_path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))  # as on a full disk
    try:
        with pytest.raises(UserError, match=r"^--job\.dump_folder: .*lock cannot be written"), hold(tmp_path / "run"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_not_a_file_is_rejected(tmp_path):
    (tmp_path / NAME).mkdir()
    for ask in (check_free, lambda folder: hold(folder).__enter__()):
        with pytest.raises(UserError, match=r"^--job\.dump_folder: .* Is a directory: .*lock"):
            ask(tmp_path)


@pytest.mark.parametrize("content", ["mine", "process 1, since", "\0"])
def test_a_file_of_the_users_named_lock_is_rejected_and_kept(content, tmp_path):
    (tmp_path / NAME).write_text(content)
    for ask in (check_free, lambda folder: hold(folder).__enter__()):
        with pytest.raises(UserError) as caught:
            ask(tmp_path)
        assert caught.value.setting == "--job.dump_folder" and str(tmp_path / NAME) in caught.value.hint
    assert (tmp_path / NAME).read_text() == content


def test_a_lock_that_is_a_link_or_a_pipe_is_not_followed_and_not_waited_for(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / NAME).symlink_to(tmp_path / "target")
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / NAME)
    for folder in ("a", "b"):
        with pytest.raises(UserError, match=r"^--job\.dump_folder: "):
            hold(tmp_path / folder).__enter__()
    assert not (tmp_path / "target").exists()


def test_a_rejected_start_leaves_no_empty_folder_that_was_not_there(tmp_path):
    for folder in ("new", "known"):
        (tmp_path / "known" / "mine").mkdir(parents=True, exist_ok=True)
        with pytest.raises(UserError), hold(tmp_path / folder):
            for name in ("comm_traces", "a/b", "tb/full"):
                (tmp_path / folder / name).mkdir(parents=True)
            (tmp_path / folder / "tb" / "full" / "file").touch()
            raise UserError("--x")
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["mine", "tb"][folder == "new" :]
        with hold(tmp_path / "fine"):
            (tmp_path / "fine" / "comm_traces").mkdir(exist_ok=True)
        assert (tmp_path / "fine" / "comm_traces").is_dir()


def test_two_of_many_processes_never_hold_a_folder_at_once(tmp_path):
    (tmp_path / "run").mkdir()
    crowd = [start(CROWD, tmp_path / "run") for _ in range(4)]
    assert [process.wait(60) for process in crowd] == [0] * 4


@pytest.mark.parametrize("module", ["flame.preflight", pytest.param("flame.train", marks=pytest.mark.slow)])
def test_the_preflight_and_the_first_rank_reject_in_one_line(module, run, tmp_path):
    flags = [f"--job.dump_folder={tmp_path}/run", f"--model.config={REPO}/configs/gla_debug.json"]
    command = [sys.executable, "-m", module, *flags]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == REFUSED
    assert done.stderr.startswith("flame: --job.dump_folder: ") and done.stderr.count("\n") == 1
    assert "a run is at work" in done.stderr
    assert len(list((tmp_path / "run").iterdir())) == 1
