"""How runs of two ranks that share every tensor save and end: by a clock, with a model alone, on a full disk."""

import json
import re

import pytest

from flame.checkpoint.commit import complete_steps, inspect_checkpoint
from tests.launch import SMALL, metrics, train_each
from tests.tiny import write_config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where the jobs of one launch have left their folders; `log` is what they said."""
    root = tmp_path_factory.mktemp("ends")
    config = write_config(root, "llama")
    (root / "text.txt").write_text("a little text for a few steps, again and again. " * 150)

    def flags(folder, what, steps, *more):
        return [
            *(*SMALL, f"--job.dump_folder={root}/{folder}", f"--job.description={what}", f"--model.config={config}"),
            *(f"--training.dataset={root}/text.txt", "--data.lanes=1", "--training.dataloader.num_workers=0"),
            *(f"--training.steps={steps}", "--training.local_batch_size=2", "--parallelism.tensor_parallel_degree=2"),
            *("--comm.train_timeout_seconds=1234", "--checkpoint.no_export", *more),
        ]

    seconds = ("--checkpoint.interval_type=seconds", "--checkpoint.interval=100000")
    model_alone = ("--checkpoint.last_save_model_only", "--checkpoint.interval=1")
    jobs = [
        flags("clock", "clock", 4, *seconds),
        flags("clock", "resumed", 6, *seconds),
        flags("alone", "finished", 2, *model_alone),
        flags("alone", "finished again", 2, *model_alone),
        flags("data", "ended", 1000, "--data.epochs=1", *model_alone),
        flags("disk", "disk", 4, "--metrics.enable_tensorboard", "--checkpoint.interval=4"),
    ]
    (root / "log").write_text(train_each(jobs, trainer="tests.faults:Odd", ranks=2))
    return root


def status(folder):
    return json.loads((folder / "status.json").read_text())


def test_all_ranks_save_when_the_clock_of_one_says_so(root):
    assert complete_steps(root / "clock" / "checkpoint") == [2, 4, 6]


def test_a_resumed_run_takes_the_timeout_of_training_after_its_first_step(root):
    timeouts = json.loads((root / "clock" / "timeouts.json").read_text())
    assert timeouts == {"5": 300, "6": 1234}


def test_a_run_that_ended_with_a_model_alone_is_complete_when_it_is_started_again(root):
    found, saved = status(root / "alone"), complete_steps(root / "alone" / "checkpoint")
    assert (found["status"], found["step"], saved) == ("completed", 2, [1, 2])
    assert found["tokens"] == metrics(root / "alone")[-1]["tokens"] > 0
    assert (found["start"]["mode"], found["start"]["restored"]) == ("resume", ["model"])
    assert not inspect_checkpoint(root / "alone" / "checkpoint" / "step-2").resumable
    assert len(metrics(root / "alone")) == 2


def test_the_end_of_the_data_leaves_a_checkpoint_that_can_be_resumed_as_it_is(root):
    found, saved = status(root / "data"), complete_steps(root / "data" / "checkpoint")
    assert (found["status"], saved[-1]) == ("data_exhausted", found["step"])
    assert inspect_checkpoint(root / "data" / "checkpoint" / f"step-{found['step']}").resumable


def test_a_run_outlives_a_disk_too_full_for_its_records_and_keeps_those_of_every_step(root):
    assert [record["step"] for record in metrics(root / "disk")] == [1, 2, 3, 4]
    assert (status(root / "disk")["status"], status(root / "disk")["step"]) == ("completed", 4)
    said = re.findall(r"(\S+) could not be written: ", (root / "log").read_text())
    assert said == [f"{root}/disk/metrics.jsonl", "W&B", f"{root}/disk/status.json"]  # each once
