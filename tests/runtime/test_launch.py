"""The launcher with ranks that are plain Python: what it shows, keeps and says of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.rendezvous import api

from flame.errors import FAILED, PREEMPTED, REFUSED, UserError
from flame.runtime import output
from flame.runtime.failure import Failure, describe, find_cause, version_of_status
from flame.runtime.launch import _report, check_port
from flame.runtime.output import LONGEST, SIZE, STARTS, Log, RankOutput, Stream
from flame.runtime.ranks import LocalRanks
from flame.runtime.torchrun import explain
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
last = rank == int(os.environ["WORLD_SIZE"]) - 1
if fault == "wait":
    time.sleep(60)
if fault == "kill" and last:
    os.kill(os.getpid(), signal.SIGKILL)
def fail(text):
    with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
        callstack = f"Traceback (most recent call last):\\n{text}\\n"
        json.dump({"message": {"message": text, "extraInfo": {"py_callstack": callstack, "timestamp": "7"}}}, file)
    sys.exit(1)
if fault == "raise" and last:
    fail("RuntimeError: the first line\\nthe second")
if fault in ("kill", "raise"):
    time.sleep(1)
    fail("RuntimeError: Connection closed by peer")
os.write(1, f"{rank} ends without a newline".encode())
"""


def start(tmp_path, fault, ranks):
    """A launch of RANK, whose run folder is tmp_path/run."""
    (tmp_path / "rank.py").write_text(textwrap.dedent(RANK))
    command = [sys.executable, "-m", "flame.runtime.launch"]
    if ranks > 1:
        command += [f"--nproc_per_node={ranks}", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
        command += ["--local-ranks-filter=0"]
    command += ["-m", "rank", fault, f"--job.dump_folder={tmp_path / 'run'}"]
    env = environment(TMPDIR=str(tmp_path)) | {"PYTHONPATH": f"{environment()['PYTHONPATH']}:{tmp_path}"}
    return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def launch(tmp_path, fault, ranks=2):
    """A finished launch of RANK."""
    launcher = start(tmp_path, fault, ranks)
    stdout, stderr = launcher.communicate()
    return SimpleNamespace(returncode=launcher.returncode, stdout=stdout, stderr=stderr)


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


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "fault, traceback, cause",
    [
        ("kill", "", " was killed by signal 9 (SIGKILL)"),
        (
            "raise",
            "Traceback (most recent call last):\nRuntimeError: the first line\nthe second\n",
            ": RuntimeError: the first line",
        ),
    ],
)
def test_a_failed_rank_is_told_once_with_where_to_look(fault, traceback, cause, ranks, tmp_path):
    done, name = launch(tmp_path, fault, ranks), f"rank{ranks - 1}.log"
    cause = f"rank {ranks - 1}{cause}"
    assert done.returncode == 1
    *before, last = done.stderr.removeprefix("[rank0]:").removeprefix("0 warns\n").splitlines(keepends=True)
    assert "".join(before) == traceback
    assert last.startswith(f"flame: {cause}") and f"status {tmp_path}/run/status.json, log {tmp_path}/run/logs/" in last
    assert last.endswith(f"-{name}\n")
    kept = logs(tmp_path)
    assert kept[name].endswith(traceback + last)
    if ranks == 2:
        assert "Connection closed" in kept["rank0.log"] or fault == "kill"  # it may be ended before it says so
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["status"], status["step"]) == ("failed", 3) and status["reason"].startswith(cause)


def test_a_rejected_job_leaves_no_log_and_one_rank_has_no_prefix(tmp_path):
    (tmp_path / "run").mkdir()
    done = launch(tmp_path, "refuse", ranks=1)
    assert (done.returncode, done.stdout, done.stderr) == (REFUSED, "0 begins\n", "0 warns\n")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_fatal_signal_ends_launcher_and_ranks_and_leaves_no_folder(ranks, tmp_path):
    launcher = start(tmp_path, "wait", ranks)
    run = tmp_path / "run"
    while not run.exists():  # the ranks are there
        time.sleep(0.05)
    launcher.send_signal(signal.SIGHUP)
    assert launcher.wait(20) == 128 + signal.SIGHUP
    launcher.communicate(timeout=5)  # no rank holds its streams
    assert not list(tmp_path.glob("flame-*"))


def failure(tmp_path, exitcode, timestamp=0, raised=None):
    """A failure, with a file of the exception that was raised at a time."""
    file = tmp_path / f"{exitcode}-{timestamp}-{raised}.json"
    if raised is not None:
        message = {"message": "ValueError: it", "extraInfo": {"py_callstack": "Traceback\n"}}
        file.write_text(json.dumps({"message": message}))
        os.utime(file, (raised, raised))
    return Failure(exitcode, str(file), timestamp)


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


def set_status(run, status, **fields):
    run.mkdir(exist_ok=True)
    (run / "status.new").write_text(json.dumps({"status": status} | fields))
    (run / "status.new").replace(run / "status.json")


def reported(run, failures, said, before):
    """The exit code and the status after ranks ended, each having said a line; only rank 0 is shown."""
    logs = {rank: Log(run, rank, is_shown=rank == 0, prefix=f"[rank{rank}]:".encode()) for rank in said}
    for rank, line in said.items():
        Stream(logs[rank], None, b"").receive(f"before\n{line}\nafter\n".encode())
    code = _report(failures, run, SimpleNamespace(logs=logs), before)
    path = run / "status.json"
    return code, json.loads(path.read_text()) if path.exists() else None


LINE = "flame: --data.x: found 3, must be 1"


@pytest.mark.parametrize("exitcode, code", [(REFUSED, REFUSED), (FAILED, 1), (PREEMPTED, PREEMPTED)])
def test_why_a_hidden_rank_ended_is_shown_unless_a_shown_one_said_the_same(exitcode, code, tmp_path, capfd):
    ended = {1: failure(tmp_path, exitcode)}
    assert reported(tmp_path / "run", ended, {0: "", 1: LINE}, None) == (code, None)
    assert capfd.readouterr().err == f"[rank1]:{LINE}\n"
    reported(tmp_path / "run", ended, {0: LINE, 1: LINE}, None)
    reported(tmp_path / "run", {0: failure(tmp_path, exitcode)}, {0: LINE, 1: ""}, None)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("was_killed", [False, True])
def test_a_mistake_found_in_training_keeps_the_logs_and_fails_the_run(was_killed, tmp_path):
    run = tmp_path / "run"
    if was_killed:
        set_status(run, "running", step=1)
    before = version_of_status(run)
    set_status(run, "running", step=3)
    code, status = reported(run, {1: failure(tmp_path, REFUSED)}, {0: "", 1: LINE}, before)
    assert (code, status["status"], status["step"]) == (REFUSED, "failed", 3)
    assert status["reason"] == f"rank 1: {LINE.removeprefix('flame: ')}"
    assert len([*(run / "logs").iterdir()]) == 2


def test_the_status_that_rank_0_set_stays_if_it_said_why_itself(tmp_path):
    run, ended = tmp_path / "run", {1: failure(tmp_path, REFUSED)}  # rank 0 may end after the launcher looked
    for first, reason in ((LINE, "its own"), ("", f"rank 1: {LINE.removeprefix('flame: ')}")):
        set_status(run, "failed", reason="its own")
        assert reported(run, ended, {0: first, 1: LINE}, None)[1]["reason"] == reason


def test_a_rejected_start_leaves_the_status_of_the_one_before_and_no_log(tmp_path):
    run = tmp_path / "run"
    set_status(run, "running", step=3)  # it was killed
    ended = {1: failure(tmp_path, REFUSED)}
    status = {"status": "running", "step": 3}
    assert reported(run, ended, {0: "", 1: LINE}, version_of_status(run)) == (REFUSED, status)
    assert [path.name for path in run.iterdir()] == ["status.json"]


def test_a_traceback_with_half_a_character_is_shown(tmp_path, capfd):
    raised = failure(tmp_path, 1, raised=1.0)
    message = {"message": "ValueError: \ud800", "extraInfo": {"py_callstack": "Traceback \ud800\n"}}
    with open(raised.error_file, "w") as file:
        json.dump({"message": message}, file)
    assert reported(tmp_path / "run", {0: raised}, {0: ""}, None)[0] == 1
    assert capfd.readouterr().err == "Traceback \\ud800\nflame: rank 0: ValueError: \\ud800\n"


def test_nodes_that_did_not_all_come_are_not_a_first_node_that_does_not_answer():
    for kind in (api.RendezvousTimeoutError, api.RendezvousClosedError):
        error = explain(kind(), "first:29500", 4)
        assert (error.setting, error.found) == ("NNODE", 4) and "first:29500" in error.hint
    error = explain(api.RendezvousConnectionError("refused"), "first:29500", 4)
    assert error.setting == "MASTER_ADDR, MASTER_PORT" and error.hint == "refused"


@pytest.mark.parametrize("end", ["before its ranks", "after them"])
def test_a_launcher_that_ends_at_once_leaves_no_folder(end, tmp_path, monkeypatch):
    def leave(number):
        raise SystemExit(number)

    ranks = LocalRanks()
    ranks.errors = str(tmp_path / "flame-errors")
    os.mkdir(ranks.errors)
    monkeypatch.setattr("flame.runtime.ranks.leave", leave)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("flame.runtime.ranks.GRACE", 0)
    if end == "after them":  # torchrun waits for those of other nodes
        ranks._processes = []
        with pytest.raises(SystemExit):
            ranks._kill()
    else:
        with pytest.raises(SystemExit):
            ranks._pass_on(signal.SIGTERM)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words, code", [(["-h"], 0), (["-m", "flame.train", "--training.stepps=3"], REFUSED)])
def test_help_or_a_mistake_in_a_command_line_that_train_sh_has_not_read_ends_in_no_traceback(words, code):
    command = [sys.executable, "-m", "flame.runtime.launch", *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert "usage: " in done.stdout if code == 0 else len(done.stderr.splitlines()) == 1


def test_ranks_that_are_started_again_go_on_in_the_same_log(tmp_path):
    (tmp_path / "run").mkdir()
    ranks = RankOutput(tmp_path / "run", set(), str(tmp_path))
    for text in (b"first\n", b"second\n"):
        stdout, _ = ranks.open(0, 0, 1)
        os.write(stdout, text)
    ranks.finish()
    assert sorted(ranks.logs[0].path.read_bytes().splitlines()) == [b"first", b"second"]


def test_a_process_that_outlives_its_rank_and_goes_on_printing_does_not_hold_the_launcher(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "PATIENCE", 0.2)
    ranks = RankOutput(tmp_path / "run", set(), str(tmp_path))
    stdout, _ = ranks.open(0, 0, 1)
    with subprocess.Popen(["yes"], stdout=stdout) as left:
        ranks.finish()
        assert left.poll() is None
        left.kill()


def test_a_line_without_an_end_is_cut(tmp_path):
    log = Log(tmp_path, 0)
    stream = Stream(log, None, b"")
    for _ in range(3 * LONGEST // (1 << 16)):
        stream.receive(b"." * (1 << 16))
        assert len(stream.rest) < LONGEST
    assert log.path.read_bytes() == (b"." * LONGEST + b"\n") * 3


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


@pytest.mark.parametrize("port", ["http", "70000", "-1"])
def test_what_is_no_port_is_rejected(port, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.setenv("NNODE", "1")
    with pytest.raises(UserError) as error:
        check_port()
    assert (error.value.setting, error.value.found) == ("MASTER_PORT", port)
