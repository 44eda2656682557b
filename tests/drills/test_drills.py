"""The drills find nothing wrong with flame, and do find what is wrong."""

import signal
import subprocess
import sys
import time

import pytest

from flame.drills.__main__ import main
from flame.drills.drill import DRILLS
from tests.launch import environment

FAST = ("data_end",)


def drill(*arguments):
    command = [sys.executable, "-m", "flame.drills", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1800)


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in DRILLS])
def test_a_drill_finds_nothing_wrong(name, tmp_path):
    done = drill(name, "--nproc=2", f"--keep={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "  ok      " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_twenty_kills_lose_nothing(mode, tmp_path):
    done = drill(
        "kill_in_save", "--times=20", "--nproc=2", f"--keep={tmp_path}", "--flags", f"--checkpoint.async_mode={mode}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "after each of 20 kills" in done.stdout


@pytest.mark.slow
def test_a_claim_that_does_not_hold_is_said_and_is_the_exit_code(tmp_path):
    done = drill("nan", "--nproc=1", f"--keep={tmp_path}", "--flags", "--training.skip_nan_inf")
    assert done.returncode == 1
    assert "FAILED  ends with exit code 1: 0 (" in done.stdout


def test_a_drill_that_there_is_not_is_refused():
    done = drill("flood")
    assert done.returncode == 2
    assert "found flood, must be one of kill_in_save, sigterm" in done.stderr and "[]" not in done.stderr


@pytest.mark.parametrize("folder", ["afile", "afile/x"])
def test_a_folder_that_cannot_be_is_refused_in_one_line(folder, tmp_path, capsys):
    (tmp_path / "afile").touch()
    assert main(["nan", f"--keep={tmp_path / folder}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("flame: --keep: ") and "afile" in said and said.count("\n") == 1


@pytest.mark.slow
def test_what_a_job_of_the_drills_says_last_is_said(tmp_path):
    done = drill("nan", "--nproc=1", f"--keep={tmp_path}", "--flags", "--training.stepps=3")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "ends with 2 (flame: --training.stepps" in done.stderr


def test_ctrl_c_ends_the_job_too_and_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "flame.drills", "nan", "--nproc=1", f"--keep={tmp_path}"]
    process = subprocess.Popen(
        command,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a job in the background ignores
    )
    pids = tmp_path / "undisturbed.pids"
    while not (pids.exists() and any(pids.iterdir())):  # until the job's rank is there
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == f"flame: nan: interrupted; the runs are in {tmp_path}\n"
    assert not any(_is_alive(int(path.name)) for path in pids.iterdir())


def _is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_runs_that_are_kept_are_not_overwritten(tmp_path):
    (tmp_path / "nan").mkdir()
    done = drill("nan", f"--keep={tmp_path}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "exists already" in done.stderr
