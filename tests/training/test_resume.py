"""A run that is killed and resumed is the run that was never killed, to the last digit."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import time

import pytest

from flame.checkpoint.commit import complete_steps
from tests.launch import SMALL, environment, metrics, torchrun, train, train_each, trajectory
from tests.tiny import write_config

STEPS, SAVED = 20, 8


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def job(root):
    """Builds the flags of a run over 1 or 3 sources."""
    for name, sentence in (("a", "short text. "), ("b", "a longer piece of text, which goes on. "), ("c", "c c ")):
        rows = [f'{{"text": "{i} {sentence * (1 + i % 7)}"}}\n' for i in range(400)]
        (root / f"{name}.jsonl").write_text("".join(rows))
    config = write_config(root, "gla")

    def flags(folder, sources, *more):
        mixed = [
            f"--training.dataset={root}/a.jsonl,{root}/b.jsonl,{root}/c.jsonl",
            "--training.data_probs=0.5,0.3,0.2",
        ]
        return [
            *SMALL,
            *(mixed if sources == 3 else []),
            f"--model.config={config}",
            f"--job.dump_folder={folder}",
            f"--checkpoint.interval={SAVED}",
            f"--training.steps={STEPS}",
            "--checkpoint.no_export",
            *more,
        ]

    return flags


@pytest.fixture(scope="module")
def undisturbed(root, job):
    """The trajectory of a run of 20 steps at once, for 1 and 3 sources."""
    train_each([job(root / f"whole{n}", n) for n in (1, 3)])
    return {n: trajectory(root / f"whole{n}") for n in (1, 3)}


def kill_after_the_save(command, folder):
    """Start a run, and kill all its processes with SIGKILL once it is past its first checkpoint."""
    started = subprocess.Popen(command, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / f"checkpoint/step-{SAVED}/.metadata").exists() or metrics(folder)[-1]["step"] == SAVED:
        assert started.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint after two minutes"
        time.sleep(0.002)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sources", [1, 3])
def test_twenty_steps_equal_eight_a_kill_and_a_resume(sources, workers, root, job, undisturbed):
    folder = root / f"killed{sources}{workers}"
    flags = job(folder, sources, f"--training.dataloader.num_workers={workers}")
    kill_after_the_save(torchrun("-m", "flame.train", *flags), folder)
    killed_at = metrics(folder)[-1]["step"]
    assert SAVED < killed_at < STEPS
    done = train(*flags)
    assert done.returncode == 0, done.stderr
    assert trajectory(folder) == undisturbed[sources]


def test_a_run_saved_on_two_ranks_goes_on_on_one_and_on_four(root, job):
    saved = root / "on2"
    train_each([job(saved, 3, "--checkpoint.interval=10", "--training.local_batch_size=4")], ranks=2)
    expected = trajectory(saved)
    assert len(expected) == STEPS
    for ranks in (1, 4):
        folder = root / f"on{ranks}"
        shutil.copytree(saved, folder)
        batch = f"--training.local_batch_size={8 // ranks}"
        train_each([job(folder, 3, "--checkpoint.load_step=10", batch)], ranks=ranks)
        assert "step" in (folder / "metrics.replaced.jsonl").read_text()  # steps 11 to 20 were done anew
        for (step, loss, norm, *data), (_, was_loss, was_norm, *was_data) in zip(
            trajectory(folder), expected, strict=True
        ):
            assert data == was_data, step  # lr, tokens and data digest
            assert loss == pytest.approx(was_loss, abs=1e-5), step
            assert norm == pytest.approx(was_norm, rel=1e-4), step


def test_a_finished_job_says_so_and_trains_nothing(root, job, undisturbed):
    folder = root / "whole1"
    before = trajectory(folder)
    done = train(*job(folder, 1))
    assert done.returncode == 0
    assert f"This job is complete: step {STEPS} of {STEPS}" in done.stdout
    assert trajectory(folder) == before


@pytest.mark.slow
def test_a_run_goes_on_from_layout_to_layout_as_if_it_had_stayed_in_one(root, job):
    flags = [
        f"--model.config={write_config(root, 'llama')}",
        "--lr_scheduler.total_steps=20",
        "--optimizer.eps=1e-6",  # Adam divides by the root of what is next to nothing in some elements: 1e-8 would make
        # a rounding error of a gradient, which depends on the layout, one of the update
    ]
    stages = [  # ranks, sequences a rank, layout; 4 steps each
        (1, 8, []),
        (4, 2, []),
        (4, 4, ["--parallelism.tensor_parallel_degree=2"]),
        (2, 8, ["--parallelism.pipeline_parallel_degree=2"]),
        (1, 8, []),
    ]
    train_each([job(root / "stayed", 3, *flags)])
    for number, (ranks, batch, layout) in enumerate(stages, 1):
        steps = [f"--training.steps={4 * number}", "--checkpoint.interval=4", f"--training.local_batch_size={batch}"]
        train_each([job(root / "moved", 3, *flags, *steps, *layout)], ranks=ranks)
    expected = trajectory(root / "stayed")
    assert len(expected) == STEPS
    for (step, loss, norm, *data), (_, was_loss, was_norm, *was_data) in zip(
        trajectory(root / "moved"), expected, strict=True
    ):
        assert data == was_data, step  # lr, tokens and data digest
        assert loss == pytest.approx(was_loss, abs=1e-5), step  # float32 sums in another order
        assert norm == pytest.approx(was_norm, rel=1e-4), step


@pytest.mark.slow
def test_a_run_whose_disk_is_full_stops_with_one_line_and_goes_on_when_there_is_room(root, job):
    folder = root / "full"
    flags = [*job(folder, 1), "--checkpoint.interval=2", "--lr_scheduler.total_steps=6"]
    assert train(*flags, "--training.steps=2", ranks=2).returncode == 0
    command = torchrun("-m", "flame.train", *flags, "--training.steps=6", ranks=2)
    command[command.index("torch.distributed.run")] = "flame.runtime.launch"
    limited = ["bash", "-c", f"ulimit -f 100 && exec {shlex.join(command)}"]  # KiB a file
    done = subprocess.run(limited, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "flame: " in done.stderr and "step-4 could not be saved: [Errno 27] File too large" in done.stderr
    assert "Traceback" not in done.stderr
    status = json.loads((folder / "status.json").read_text())
    assert (status["status"], complete_steps(folder / "checkpoint")) == ("failed", [2])
    assert train(*flags, "--training.steps=6", ranks=2).returncode == 0
    assert complete_steps(folder / "checkpoint") == [2, 4, 6]
