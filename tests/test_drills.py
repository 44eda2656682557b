"""The drills find nothing wrong with flame, and do find what is wrong."""

import subprocess
import sys

import pytest

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
    assert "FAILED  ends with exit code 1: 0, see" in done.stdout


def test_a_drill_that_there_is_not_is_refused():
    done = drill("flood")
    assert done.returncode == 2
    assert "kill_in_save" in done.stderr


def test_runs_that_are_kept_are_not_overwritten(tmp_path):
    (tmp_path / "nan").mkdir()
    done = drill("nan", f"--keep={tmp_path}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "exists already" in done.stderr
