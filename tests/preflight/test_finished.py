"""A command whose run is complete is answered without ranks, and only as long as the run is as it was left."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from flame.config.parser import parse
from flame.preflight import finished
from flame.preflight.__main__ import ANSWERED
from flame.preflight.finished import describe_finished
from tests.launch import SMALL, environment, train
from tests.tiny import write_config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a run that is complete, and the output of a rank that was asked for it once more."""
    folder = tmp_path_factory.mktemp("finished")
    write_config(folder, "llama")
    (folder / "text.txt").write_text("a little text for a few steps, again and again. " * 300)
    done = [train(*flags(folder)) for _ in range(2)]
    assert [each.returncode for each in done] == [0, 0], done[0].stderr
    (folder / "again.log").write_text(done[1].stdout)
    return folder


def flags(root, *more):
    return [
        *(*SMALL, f"--job.dump_folder={root}/run", f"--model.config={root}/llama.json", "--training.steps=2"),
        *(f"--training.dataset={root}/text.txt", "--data.lanes=2", "--training.local_batch_size=2"),
        *("--checkpoint.interval=1", *more),
    ]


@pytest.fixture
def run(root, tmp_path):
    """A copy of the folder, whose config.toml names the copy."""
    shutil.copytree(root, tmp_path / "copy")
    record = tmp_path / "copy/run/config.toml"
    record.write_text(record.read_text().replace(str(root), str(tmp_path / "copy")))
    return tmp_path / "copy"


def test_it_says_what_a_rank_says_and_touches_nothing_and_imports_no_torch(root):
    def state():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}

    before = state()
    code = "import sys; from flame.preflight.__main__ import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *flags(root)], env=environment(), capture_output=True, text=True)
    said, _, last = done.stdout.rstrip().rpartition("\n")
    assert (last, done.stderr) == (f"{ANSWERED} False", "")
    assert state() == before
    expected = (root / "again.log").read_text()
    expected = expected[expected.index("This job is complete") :]
    assert "This job is complete: step 2 of 2 is done; nothing was trained." in expected and "hf/step-2" in expected
    assert re.sub(r"\d\d:\d\d:\d\d I ", "", said) == re.sub(r"\d\d:\d\d:\d\d I ", "", expected).rstrip()


def test_it_is_answered_for_a_copy_of_the_folder_too_and_without_an_export_that_nobody_wants(run):
    assert len(describe_finished(parse(flags(run)))) == 2
    shutil.rmtree(run / "run/hf")
    record = run / "run/config.toml"
    record.write_text(record.read_text().replace("export = true", "export = false"))
    assert "  model" not in describe_finished(parse(flags(run, "--checkpoint.no_export")))[1]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def set_status(run, **fields):
    path = run / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "change",
    [
        lambda run: flip(run / "checkpoint/step-2/__0_0.distcp"),
        lambda run: (run / "checkpoint/step-2/complete.json").unlink(),
        lambda run: (run / "checkpoint/step-1/__0_0.distcp").unlink(),  # a rank reports it
        lambda run: shutil.rmtree(run / "hf"),
        lambda run: os.truncate(run / "hf/step-2/model.safetensors", 1000),
        lambda run: flip(run / "checkpoint/step-2/.metadata"),
        lambda run: set_status(run, status="preempted"),
        lambda run: set_status(run, step=1),
        lambda run: (run / "config.toml").unlink(),
        lambda run: os.utime(run.parent / "llama.json"),
    ],
)
def test_a_run_that_is_not_as_it_was_left_is_for_its_ranks(change, run):
    assert describe_finished(parse(flags(run)))
    change(run / "run")
    assert describe_finished(parse(flags(run))) == []


@pytest.mark.parametrize(
    "more",
    ["--training.steps=3", "--optimizer.lr=0.5", "--checkpoint.load_step=1", "--checkpoint.export_dtype=bfloat16"],
)
def test_another_job_is_for_its_ranks(more, run):
    assert describe_finished(parse(flags(run, more))) == []


def test_several_nodes_and_a_large_checkpoint_are_for_the_ranks(run, monkeypatch):
    monkeypatch.setattr(finished, "HASHED", 1000)
    assert describe_finished(parse(flags(run))) == []
    monkeypatch.undo()
    monkeypatch.setenv("NNODE", "2")
    assert describe_finished(parse(flags(run))) == []
