"""The drills pass on flame, and fail where a claim does not hold."""

import signal
import subprocess
import sys
import time

import pytest

from flame.drills.__main__ import main
from flame.drills.drill import DRILLS
from flame.drills.job import is_alive
from tests.launch import environment

FAST = ("data_end",)


def drill(*arguments):
    command = [sys.executable, "-m", "flame.drills", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=3600)


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in DRILLS])
def test_every_check_of_a_drill_holds(name, tmp_path):
    done = drill(name, "--nproc=2", f"--keep={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "  ok      " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_thirty_kills_lose_nothing(mode, tmp_path):
    done = drill(
        "kill_in_save", "--times=30", "--nproc=2", f"--keep={tmp_path}", "--flags", f"--checkpoint.async_mode={mode}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  ok      kill ") == 30


@pytest.mark.slow
def test_a_check_that_fails_is_reported_and_makes_the_exit_code_1(tmp_path):
    done = drill("nan", "--nproc=1", f"--keep={tmp_path}", "--flags", "--training.skip_nan_inf")
    assert done.returncode == 1
    assert "FAILED  ends with exit code 1: 0 (" in done.stdout


@pytest.mark.slow
def test_a_job_that_cannot_start_is_reported_by_its_last_line(tmp_path):
    done = drill("nan", "--nproc=1", f"--keep={tmp_path}", "--flags", "--training.stepps=3")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "ends with 2 (flame: --training.stepps" in done.stderr


@pytest.mark.parametrize(
    "arguments, found",
    [
        (["flood"], "flame: drill: found flood, must be one of kill_in_save, sigterm"),
        (["nan", "--times=0"], "flame: --times: found 0, must be 1 or more"),
        (["nan", "--keep={folder}/file"], "flame: --keep: "),
        (["nan", "--keep={folder}/file/x"], "flame: --keep: "),
        (["nan", "--keep={folder}"], "file, which exists already"),  # runs that are kept are not overwritten
    ],
)
def test_a_usage_error_is_one_line_and_exit_code_2(arguments, found, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([argument.format(folder=tmp_path) for argument in arguments]) == 2
    line = capsys.readouterr().err
    assert found in line and line.count("\n") == 1


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
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == f"flame: nan: interrupted; the runs are in {tmp_path}\n"
    assert not any(is_alive(int(path.name)) for path in pids.iterdir())
