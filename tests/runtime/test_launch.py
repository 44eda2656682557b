"""The launcher with ranks that are plain Python: what it shows, keeps and says of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from flame.errors import FAILED, REFUSED, UserError
from flame.runtime.failure import describe, find_cause
from flame.runtime.launch import check_port
from flame.runtime.output import SIZE, STARTS, Log, Stream
from tests.launch import environment

RANK = """
import json, os, signal, sys, time
rank, (fault, *_) = int(os.environ["RANK"]), sys.argv[1:]
run = sys.argv[2].partition("=")[2]
print(f"{rank} begins", flush=True)
print(f"{rank} warns", file=sys.stderr, flush=True)
if fault == "refuse":
    time.sleep(0.5)
    sys.exit(2)
os.makedirs(run, exist_ok=True)
with open(f"{run}/status.json", "w") as status:
    json.dump({"status": "running", "step": 3}, status)
if fault == "kill" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
def fail(text):
    with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
        callstack = f"Traceback (most recent call last):\\n{text}\\n"
        json.dump({"message": {"message": text, "extraInfo": {"py_callstack": callstack, "timestamp": "7"}}}, file)
    sys.exit(1)
if fault == "raise" and rank == 1:
    fail("RuntimeError: the first line\\nthe second")
if fault in ("kill", "raise"):
    time.sleep(1)
    fail("RuntimeError: Connection closed by peer")
os.write(1, f"{rank} ends without a newline".encode())
"""


def launch(tmp_path, fault, ranks=2):
    """A finished launch of RANK, whose run folder is tmp_path/run."""
    (tmp_path / "rank.py").write_text(textwrap.dedent(RANK))
    command = [sys.executable, "-m", "flame.runtime.launch", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=localhost:0", "--local-ranks-filter=0", "-m", "rank", fault]
    env = environment(TMPDIR=str(tmp_path)) | {"PYTHONPATH": f"{environment()['PYTHONPATH']}:{tmp_path}"}
    return subprocess.run(
        [*command, f"--job.dump_folder={tmp_path / 'run'}"], cwd=tmp_path, env=env, capture_output=True, text=True
    )


def logs(tmp_path):
    return {path.name.rpartition("-")[2]: path.read_text() for path in (tmp_path / "run/logs").iterdir()}


def test_a_run_keeps_what_every_rank_printed_and_shows_the_first_without_a_folder_left_behind(tmp_path):
    done = launch(tmp_path, "none")
    assert (done.returncode, done.stderr) == (0, "[rank0]:0 warns\n")
    assert done.stdout == "[rank0]:0 begins\n[rank0]:0 ends without a newline\n"
    kept = logs(tmp_path)
    assert kept.keys() == {"rank0.log", "rank1.log"}
    assert sorted(kept["rank1.log"].splitlines()) == ["1 begins", "1 ends without a newline", "1 warns"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["rank.py", "run"]


@pytest.mark.parametrize(
    "fault, traceback, cause",
    [
        ("kill", "", "rank 1 was killed by signal 9 (SIGKILL)"),
        (
            "raise",
            "Traceback (most recent call last):\nRuntimeError: the first line\nthe second\n",
            "rank 1: RuntimeError: the first line",
        ),
    ],
)
def test_a_failed_rank_is_told_once_with_where_to_look(fault, traceback, cause, tmp_path):
    done = launch(tmp_path, fault)
    assert done.returncode == 1
    *before, last = done.stderr.removeprefix("[rank0]:0 warns\n").splitlines(keepends=True)
    assert "".join(before) == traceback
    assert last.startswith(f"flame: {cause}") and f"status {tmp_path}/run/status.json, log {tmp_path}/run/logs/" in last
    assert last.endswith("-rank1.log\n")
    kept = logs(tmp_path)
    assert kept["rank1.log"].endswith(traceback + last)
    assert "Connection closed" in kept["rank0.log"] or fault == "kill"  # it may be ended before it says so
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["status"], status["step"]) == ("failed", 3) and status["reason"].startswith(cause)


def test_a_rejected_job_leaves_no_log_and_one_rank_has_no_prefix(tmp_path):
    (tmp_path / "run").mkdir()
    done = launch(tmp_path, "refuse", ranks=1)
    assert (done.returncode, done.stdout, done.stderr) == (REFUSED, "0 begins\n", "0 warns\n")
    assert list((tmp_path / "run").iterdir()) == []


def failure(tmp_path, exitcode, timestamp=0, raised=None):
    """A ProcessFailure, with a file of the exception that was raised at a time."""
    file = tmp_path / f"{exitcode}-{timestamp}-{raised}.json"
    if raised is not None:
        message = {"message": "ValueError: it", "extraInfo": {"py_callstack": "Traceback\n"}}
        file.write_text(json.dumps({"message": message}))
        os.utime(file, (raised, raised))
    name = signal.Signals(-exitcode).name if exitcode < 0 else ""
    return SimpleNamespace(exitcode=exitcode, timestamp=timestamp, error_file=str(file), signal_name=lambda: name)


def test_the_cause_is_the_rank_that_the_others_failed_after(tmp_path):
    def cause(**failures):
        return find_cause({int(rank[1:]): found for rank, found in failures.items()})[0]

    killed, raised = failure(tmp_path, -9, 5), failure(tmp_path, 1, 5, raised=100.5)
    later, stopped = failure(tmp_path, 1, 5, raised=101.0), failure(tmp_path, -15, 5)
    assert cause(r0=raised, r1=killed) == 1  # both had ended when the launcher looked
    assert cause(r0=raised, r1=failure(tmp_path, -9, 35)) == 0  # it did not end, and torchrun killed it
    assert cause(r0=later, r1=raised) == 1
    assert cause(r2=stopped, r3=failure(tmp_path, 7)) == 2
    assert cause(r0=failure(tmp_path, FAILED), r1=raised) == 0  # it has said why
    assert cause(r0=raised, r1=stopped) == 0


def test_a_cause_is_one_line(tmp_path):
    assert describe(3, failure(tmp_path, 1, raised=1.0)) == "rank 3: ValueError: it"
    assert describe(0, failure(tmp_path, 7)) == "rank 0 ended with exit code 7"
    assert describe(0, failure(tmp_path, -11)) == "rank 0 was killed by signal 11 (SIGSEGV)"


def test_a_log_waits_for_the_run_folder_and_is_bounded_in_size_and_number(tmp_path):
    run = tmp_path / "run"
    log = Log(run, 3)
    log.write(b"early\n")
    assert not run.exists()
    (run / "logs").mkdir(parents=True)
    for day in range(STARTS + 3):
        for name in (f"202601{day:02d}-000000-rank3.log", f"202601{day:02d}-000000-rank13.log"):
            (run / "logs" / name).touch()
    log.write(b"late\n")
    assert log.path.read_bytes() == b"early\nlate\n"
    assert len(list((run / "logs").glob("*-rank3.log"))) == STARTS
    assert len(list((run / "logs").glob("*-rank13.log"))) == STARTS + 3
    for _ in range(3 * SIZE // (1 << 20) + 2):
        log.write(b"x" * ((1 << 20) - 1) + b"\n")
    assert sum(path.stat().st_size for path in (run / "logs").iterdir()) <= 2 * (SIZE + (1 << 20))


def test_a_log_that_cannot_be_written_costs_nothing_but_itself(tmp_path):
    (tmp_path / "logs").write_text("a file in its place")
    log = Log(tmp_path, 0)
    log.write(b"lost\n")
    (tmp_path / "logs").unlink()
    log.write(b"kept\n")
    assert log.path.read_bytes() == b"lost\nkept\n"


def test_lines_are_shown_whole_and_a_progress_bar_line_by_line(tmp_path):
    log = Log(tmp_path, 0)
    readable, writable = os.pipe()
    stream = Stream(log, writable, b"> ")
    for text in (b"one\ntw", b"o\r\n 1%\r", b" 2%\r", b"\xff last", b""):
        stream.receive(text)
    os.close(writable)
    with open(readable, "rb") as file:
        assert file.read() == b"> one\n> two\n>  1%\n>  2%\n> \xff last\n"
    assert log.path.read_bytes() == b"one\ntwo\n 1%\n 2%\n\xff last\n"


def test_a_port_that_is_taken_is_rejected(monkeypatch):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError) as error:
            check_port()
        assert (error.value.setting, error.value.found) == ("MASTER_PORT", str(port))
        monkeypatch.setenv("NNODE", "2")  # the first node may be another
        check_port()
    monkeypatch.setenv("NNODE", "1")
    check_port()
