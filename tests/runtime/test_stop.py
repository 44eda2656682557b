"""A run that is asked to stop saves its work, logs that, and resumes later as if it had never stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flame.config.parser import parse, to_toml
from flame.errors import PREEMPTED, REFUSED, UserError
from flame.preflight.validate import check
from flame.runtime.stop import seconds
from tests.launch import REPO, SMALL, environment, metrics, train_each
from tests.tiny import write_config


def steps_and_validations(folder):
    """What was logged of each step that must not depend on stops, and the steps after which it was validated."""
    kept = ("step", "loss", "grad_norm", "lr", "tokens", "data_digest")
    records = metrics(folder)
    return (
        [tuple(r[name] for name in kept) for r in records if "loss" in r],
        [r["step"] for r in records if "validation/loss" in r],
    )


@pytest.mark.parametrize(
    "text, expected",
    [("45", 45), ("45s", 45), ("90m", 5400), ("3h30m", 12600), ("2d", 172800), ("1d2h3m4s", 93784)],
)
def test_a_duration_is_read_in_the_units_that_it_names(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0m", "3h30", "1.5h", "-5", "30m3h", "soon", "3 h"])
def test_a_text_that_is_not_a_duration_is_rejected(text):
    with pytest.raises(UserError) as caught:
        seconds(text)
    assert caught.value.setting == "--training.max_wall_time"
    assert caught.value.found == repr(text) and "3h30m" in caught.value.allowed


def test_the_flag_is_checked_before_anything_starts():
    with pytest.raises(UserError, match=r"--training\.max_wall_time: found 'soon'"):
        check(parse(["--training.max_wall_time=soon"]), 1)


def test_a_toml_may_give_the_time_as_a_number(tmp_path):
    (tmp_path / "job.toml").write_text("[training]\nmax_wall_time = 3600\n")
    config = parse([f"--job.config_file={tmp_path}/job.toml"])
    assert seconds(config.training.max_wall_time) == 3600
    assert "max_wall_time = 3600\n" in to_toml(config)
    (tmp_path / "job.toml").write_text("[training]\nmax_wall_time = -5\n")
    with pytest.raises(UserError, match=r"--training\.max_wall_time: found -5"):
        check(parse([f"--job.config_file={tmp_path}/job.toml"]), 1)


LISTENER = """
import os, signal
from types import SimpleNamespace
from flame.runtime import stop
now = 100.0
stop.time = SimpleNamespace(monotonic=lambda: now)
log = lambda word: lambda number: print(word, signal.Signals(number).name)
stop.Signals(log("first"), log("again")).listen()
for after, number in (0, signal.SIGUSR1), (1, signal.SIGTERM), (4.9, signal.SIGINT), (5.1, signal.SIGTERM):
    now = 100 + after
    os.kill(os.getpid(), number)
"""


def test_signals_within_five_seconds_of_the_first_are_the_same_request_and_a_later_one_is_a_second():
    done = subprocess.run([sys.executable, "-c", LISTENER], stdout=subprocess.PIPE, text=True, env=environment())
    assert done.stdout == "first SIGUSR1\nagain SIGTERM\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_before_a_rank_listens_is_kept_and_ends_it_in_one_line(number):
    early = (
        "import signal, os; signal.pthread_sigmask(signal.SIG_BLOCK, list(signal.Signals)); os.kill(os.getpid(), %d)"
    )
    rank = "; from flame.train import main; main(['--training.steps=1'])"
    done = subprocess.run([sys.executable, "-c", early % number + rank], env=environment(), capture_output=True)
    text = f"flame: stopped by {number.name} before training began; the same command starts it again\n"
    assert (done.returncode, done.stderr.decode()) == (PREEMPTED, text)


ASKED = (  # where a run of 8 steps is asked to stop, one time after the other
    "3:1 SIGUSR1",  # in a step, which is finished
    "4:2 SIGTERM",  # before the first batch of validation
    "6:1 max_wall_time",
    "7:1 SIGINT",  # in the first step of a start
    "",
)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_stops_in_a_step_and_in_validation_resumes_as_if_it_never_had(ranks, tmp_path):
    (tmp_path / "held_out.txt").write_text("held out text, of which there is enough for some rows. " * 80)

    def flags(name, place):
        return [
            *(*SMALL, f"--job.dump_folder={tmp_path}/{name}", f"--job.description={place}", "--checkpoint.no_export"),
            *(
                f"--model.config={write_config(tmp_path, 'llama')}",
                "--training.steps=8",
                "--training.local_batch_size=2",
            ),
            *("--training.gradient_accumulation_steps=2", "--checkpoint.interval=100", "--data.lanes=2"),
            *(f"--training.dataset={tmp_path}/held_out.txt", "--training.dataloader.num_workers=0"),
            *("--validation.enable", f"--validation.dataset={tmp_path}/held_out.txt", "--validation.freq=4"),
            *("--validation.local_batch_size=4", "--validation.seq_len=128"),
        ]

    jobs = [flags("whole", ""), *(flags("stopped", place) for place in ASKED)]
    log = train_each(jobs, ranks=ranks, trainer="tests.faults:Asked")
    whole, stopped = steps_and_validations(tmp_path / "whole"), steps_and_validations(tmp_path / "stopped")
    assert len(whole[0]) == 8
    assert stopped[0] == whole[0]
    assert (whole[1], stopped[1]) == ([1, 4, 8], [1, 8])  # the one that was cut short is not made up for
    saves = [log.count(f"Saving a full checkpoint at step {step}.") for step in range(1, 9)]
    assert saves == [ranks * (step in (3, 4, 6, 7)) for step in range(1, 9)]  # one on each rank


class Job:
    """A run by train.sh in the background, whose processes can be signalled."""

    def __init__(self, folder, flags, ranks=1):
        self.folder, self.log = folder, folder.with_suffix(".log")
        self.began = len(metrics(folder)) if (folder / "metrics.jsonl").exists() else 0
        with open(self.log, "w") as log:
            env = environment(NGPU=str(ranks), FLAME_PYTHON=sys.executable)
            command = ["bash", str(REPO / "train.sh"), f"--job.dump_folder={folder}", *flags]
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)

    def wait_for(self, holds, what):
        """Wait until `holds()`, two minutes at most."""
        deadline = time.monotonic() + 120
        while not holds():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"no {what} after two minutes: {self.log.read_text()}"
            time.sleep(0.002)

    def wait_for_step(self, step):
        path = self.folder / "metrics.jsonl"
        self.wait_for(lambda: path.exists() and f'{{"step": {step}, "loss"' in path.read_text(), f"step {step}")

    def ranks(self):
        """The process ids of the launcher's children."""
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    def send(self, number, to):
        """Signal the launcher ("launcher"), or one of its ranks (a number)."""
        os.kill(self.process.pid if to == "launcher" else self.ranks()[to], number)

    def end(self, within):
        """The exit code and the status, once the launcher has ended."""
        began = time.monotonic()
        code = self.process.wait(timeout=120)
        assert time.monotonic() - began < within
        status = self.folder / "status.json"
        return code, json.loads(status.read_text()) if status.exists() else {}


def slow_flags(root, *more):
    """Steps of four microbatches, and validations of about a second."""
    (root / "held_out.txt").write_text("held out text, of which there is enough for some time. " * 2000)
    return [
        *(*SMALL, f"--model.config={write_config(root, 'gla')}", "--checkpoint.no_export", "--training.steps=60"),
        *("--training.local_batch_size=2", "--training.gradient_accumulation_steps=4", "--checkpoint.interval=25"),
        *("--validation.enable", f"--validation.dataset={root}/held_out.txt", "--validation.freq=20"),
        *("--validation.local_batch_size=1", "--validation.seq_len=128", *more),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_each_signal_to_the_launcher_or_one_rank_ends_in_a_checkpoint_from_which_the_run_goes_on(ranks, tmp_path):
    flags = slow_flags(tmp_path)
    whole = Job(tmp_path / "whole", flags, ranks)
    assert whole.end(within=120)[0] == 0
    others = ("launcher", ranks - 1)
    for number, step, to in (
        (signal.SIGUSR1, 5, others[ranks - 1]),  # in a step
        (signal.SIGTERM, 20, others[ranks - 2]),  # in the validation after it
        (signal.SIGINT, 33, others[ranks - 1]),
        (signal.SIGTERM, 41, "launcher"),
    ):
        job = Job(tmp_path / "stopped", flags, ranks)
        job.wait_for_step(step)
        job.send(number, to)
        code, status = job.end(within=20)
        text = job.log.read_text()
        assert (code, status["status"], status["reason"]) == (PREEMPTED, "preempted", number.name), text
        assert step <= status["step"] < 60
        assert (step != 20) or status["step"] == 20
        checkpoint = tmp_path / "stopped" / "checkpoint" / f"step-{status['step']}"
        assert (checkpoint / ".metadata").exists()
        assert (
            f"preempted at step {status['step']} ({number.name}), the last checkpoint is {checkpoint}; go on: " in text
        )
        assert "Traceback" not in text and "torch.distributed.elastic" not in text
    last = Job(tmp_path / "stopped", flags, ranks)
    assert last.end(within=120)[0] == 0
    (steps, validated), (stopped_steps, stopped_validated) = map(
        steps_and_validations, (tmp_path / "whole", tmp_path / "stopped")
    )
    assert len(steps) == 60
    assert stopped_steps == steps
    assert (validated, stopped_validated) == ([1, 20, 40, 60], [1, 40, 60])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_signal_stops_at_once_and_one_within_five_seconds_does_not(ranks, tmp_path):
    flags = slow_flags(tmp_path, "--checkpoint.interval=1")
    if ranks == 1:  # the second step takes half a minute
        flags += ["--validation.no_enable", "--training.gradient_accumulation_steps=1", "--training.local_batch_size=8"]
        flags += ["--training.seq_len=32768"]
    job = Job(tmp_path / "slow", flags, ranks)
    job.wait_for((tmp_path / "slow/checkpoint/step-1/.metadata").exists, "checkpoint")
    time.sleep(1)
    if ranks == 2:
        job.send(signal.SIGSTOP, 1)  # the first rank then waits for it inside a collective
    for pause in (0, 1, 1):
        time.sleep(pause)
        job.send(signal.SIGTERM, "launcher")
    time.sleep(4)
    assert job.process.poll() is None, "it did not go on with its step"
    ranks_alive = job.ranks()
    job.send(signal.SIGINT, "launcher")
    code, status = job.end(within=8)
    assert code == 128 + signal.SIGINT, job.log.read_text()
    assert "Traceback" not in job.log.read_text()
    if ranks == 1:
        assert (status["status"], status["reason"]) == ("failed", "a second signal, SIGINT: stopped at once")
    else:  # killed before they could write it
        assert status["status"] == "running"
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks_alive)


@pytest.mark.slow
def test_a_run_whose_folder_is_moved_stops_at_its_next_save_and_makes_no_other(tmp_path):
    job = Job(tmp_path / "here", slow_flags(tmp_path, "--checkpoint.interval=10", "--training.steps=100000"), ranks=2)
    job.wait_for_step(11)
    (tmp_path / "here").rename(tmp_path / "there")
    code, _ = job.end(within=100)
    text = job.log.read_text()
    assert code == REFUSED and "Traceback" not in text, text
    assert text.count(f"flame: --job.dump_folder: found no records of this run in {tmp_path}/here") == 1
    assert not (tmp_path / "here").exists() and (tmp_path / "there/checkpoint/step-10/complete.json").exists()


@pytest.mark.slow
def test_a_run_whose_time_is_over_stops_as_at_a_signal(tmp_path):
    job = Job(tmp_path / "timed", slow_flags(tmp_path, "--training.max_wall_time=45s", "--training.steps=100000"))
    code, status = job.end(within=100)
    assert (code, status["status"], status["reason"]) == (PREEMPTED, "preempted", "max_wall_time"), job.log.read_text()
    assert (tmp_path / "timed" / "checkpoint" / f"step-{status['step']}" / ".metadata").exists()


@pytest.mark.slow
def test_a_signal_before_the_ranks_run_and_one_while_they_start_end_the_run_in_one_line(tmp_path):
    for when in ("launching", "importing"):
        job = Job(tmp_path / when, slow_flags(tmp_path))
        launcher = Path(f"/proc/{job.process.pid}/cmdline")
        job.wait_for(lambda path=launcher: b"flame.runtime.launch" in path.read_bytes(), "launcher")
        if when == "importing":
            job.wait_for(job.ranks, "rank")
        time.sleep(0.5)
        job.send(signal.SIGINT, "launcher")
        code, status = job.end(within=60)
        text = job.log.read_text()
        assert code == PREEMPTED, text
        assert text.count("stopped by SIGINT before training began; the same command starts it again\n") == 1
        assert "Traceback" not in text
        assert not status


@pytest.mark.slow
def test_a_signal_during_the_export_ends_it_without_a_folder_and_the_next_run_does_it(tmp_path):
    flags = [flag for flag in slow_flags(tmp_path, "--training.steps=2") if flag != "--checkpoint.no_export"]
    job = Job(tmp_path / "exported", flags)
    hf = tmp_path / "exported" / "hf"
    job.wait_for(hf.exists, "export")
    job.send(signal.SIGTERM, "launcher")
    code, status = job.end(within=20)
    assert (code, status["status"], status["reason"]) == (PREEMPTED, "preempted", "SIGTERM, before the export was done")
    assert list(hf.iterdir()) == []
    assert "Traceback" not in job.log.read_text()
    again = Job(tmp_path / "exported", flags)
    assert again.end(within=120)[0] == 0
    assert (hf / "step-2" / "config.json").exists()


@pytest.mark.slow
def test_a_learning_rate_that_breaks_the_weights_ends_in_one_line_and_exit_code_1(tmp_path):
    for name, more, report in (
        ("checked", [], "flame: step 2: not finite: the loss and "),
        (
            "unchecked",
            [
                "--optimizer.early_step_in_backward",
                "--training.gradient_accumulation_steps=1",
                "--checkpoint.interval=1",
            ],
            "flame: step 1: not finite after",
        ),
    ):
        flags = slow_flags(tmp_path, "--optimizer.lr=1e39", "--lr_scheduler.warmup_steps=0", *more)
        job = Job(tmp_path / name, [flag for flag in flags if flag != "--validation.enable"])
        code, status = job.end(within=120)
        text = job.log.read_text()
        assert (code, status["status"]) == (1, "failed"), text
        assert text.count("flame: step") == 1 and report in text
        assert "Traceback" not in text and "ChildFailedError" not in text and "error file" not in text
        assert not (tmp_path / name / "checkpoint").exists()
