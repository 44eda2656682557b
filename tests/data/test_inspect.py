"""What a run was fed can be read from its folder again, and two runs be compared, exactly."""

import json
import os
import shutil

import pytest
import torch.distributed.checkpoint as dcp

from flame.config.parser import parse, to_toml
from flame.data.__main__ import main
from flame.data.inspect import read_start, replay
from flame.data.ledger import digest_batch, roll
from flame.data.loader import build_dataloader
from flame.data.source import build_sources
from flame.data.tokenize import build_tokenizer
from flame.errors import UserError
from flame.runtime.environment import describe_environment
from flame.runtime.run_folder import Run, to_json
from tests.launch import SMALL, train_each
from tests.tiny import write_config

STEPS, BATCH, SEQ = 9, 4, 32
SAVED, LOGGED = (3, 6), 2


def write_run(folder, *flags):
    """The folder of a run of 9 steps that logs every second and saves at 3 and 6; returns each step's input rows."""
    config = parse([f"--training.seq_len={SEQ}", f"--training.local_batch_size={BATCH}", "--data.lanes=8", *flags])
    config.job.dump_folder = str(folder)
    sources = build_sources(config.training, config.data)
    tokenizer = build_tokenizer("byte")
    loader = build_dataloader(sources=sources, dp_world_size=1, dp_rank=0, tokenizer=tokenizer, job_config=config)
    run, batches, digest, fed = Run(folder, writes=True), iter(loader), "", {}
    with run.begin({"config.toml": to_toml(config), "environment.json": to_json(describe_environment({"ranks": 1}))}):
        pass
    for step in range(1, STEPS + 1):
        inputs, labels = next(batches)
        digest = roll(digest, digest_batch(inputs["input"], labels, range(BATCH)))
        fed[step] = inputs["input"].tolist()
        tokens = step * BATCH * config.training.seq_len
        if step % LOGGED == 0:
            run.log({"step": step, "tokens": tokens, "data_digest": digest})
        if step in SAVED:
            trained = {"step": step, "tokens": tokens, "data_digest": digest}
            state = {"dataloader": loader.state_dict(), "train_state": trained}
            dcp.save(state, checkpoint_id=folder / "checkpoint" / f"step-{step}", no_dist=True)
    batches.close()
    return fed


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, words in (("a", "red green blue "), ("b", "eins zwei drei vier ")):
        rows = [{"text": f"<{name}{i}> {words * (1 + i % 5)}"} for i in range(60)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def flags(texts):
    return [f"--training.dataset={texts}/a.jsonl,{texts}/b.jsonl", "--training.varlen"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, flags):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, write_run(folder, *flags)


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run that a test may spoil."""
    return shutil.copytree(made[0], tmp_path / "run")


def said(capsys, *argv):
    """Exit code and output of `flame.sh data`."""
    code = main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize("step", [1, 3, 4, 7, 9])
def test_a_step_is_decoded_exactly_from_any_checkpoint_before_it(step, made):
    folder, fed = made
    found = replay(folder, step)
    assert [row.tokens[:-1].tolist() for row in found.rows] == fed[step]
    assert found.start == max(s for s in (0, *SAVED) if s < step)
    assert found.first == (step - 1) * BATCH
    assert found.expected in (found.found, None) and (found.expected is None) == (step > 8)


def test_a_step_is_shown_as_text_with_its_sources_and_its_digest(made, capsys):
    code, text = said(capsys, "show", made[0], "--step", 4, "--full")
    assert code == 0
    for words in ("step 4", "sequences 12 to 15", "checkpoint step-3", "row 3  sequence 15  lane 7", "step 4\n"):
        assert words in text, words
    digest = [json.loads(line) for line in (made[0] / "metrics.jsonl").read_text().splitlines()][1]["data_digest"]
    assert f"digest {digest}: as logged at step 4" in text
    begun = [line for line in text.splitlines() if " begins " in line]
    assert begun and all(("<a" in line) == (" a begins" in line) for line in begun)
    assert any(" b begins" in line and "<b" in line for line in begun)


def test_a_long_piece_is_clipped_to_its_ends_unless_asked_in_full(tmp_path, capsys):
    write_run(tmp_path / "run", "--training.dataset=stdlib", "--training.seq_len=512")
    short, full = (said(capsys, "show", tmp_path / "run", "--step", 1, *more)[1] for more in ((), ("--full",)))
    assert " ... " in short and len(short) < len(full) / 2


def test_the_ranks_share_the_rows_of_a_step(made, capsys):
    def rows(*more):
        text = said(capsys, "show", made[0], "--step", 2, *more)[1]
        return [line for line in text.splitlines() if line.startswith("row ")]

    assert rows("--rank", 1, "--ranks", 2) == rows()[1::2]
    assert rows("--rank", 0, "--ranks", 4) == rows()[:1]
    assert rows("--rank", 0) == rows()  # the run had one rank


def test_a_change_of_the_text_is_reported(tmp_path, capsys):
    text = tmp_path / "c.jsonl"
    text.write_text("".join(f'{{"text": "{i} some words"}}\n' for i in range(80)))
    write_run(tmp_path / "run", f"--training.dataset={text}")
    text.write_text(text.read_text().replace("some", "same"))
    code, said_now = said(capsys, "show", tmp_path / "run", "--step", 6)
    assert code == 1 and "DIFFERENT DATA: the digest at step 6" in said_now


def test_without_a_record_from_the_step_on_nothing_is_compared(made, capsys):
    code, text = said(capsys, "show", made[0], "--step", 9)
    assert code == 0 and "not compared" in text


def test_the_batch_of_the_time_is_shown_though_the_config_names_another_now(run):
    config = run / "config.toml"
    config.write_text(config.read_text().replace(f"local_batch_size = {BATCH}\n", "local_batch_size = 2\n", 1))
    found = replay(run, 5)
    assert len(found.rows) == BATCH and found.found == found.expected


def test_checkpoints_that_are_incomplete_or_hold_the_model_only_are_passed_over(run):
    (run / "checkpoint/step-6/.metadata").unlink()
    dcp.save({"weight": 1}, checkpoint_id=run / "checkpoint/step-7", no_dist=True)
    assert read_start(run / "checkpoint", 9).step == 3
    assert read_start(run / "checkpoint", 3).step == 0
    assert replay(run, 8).found == replay(run, 8).expected
    with pytest.raises(UserError, match=r"^--step: found 999999999, must be at most \d+"):
        replay(run, 999_999_999)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--step", 0], ["--step", "found 0", "1 or more"]),
        (["--step", 2, "--ranks", 0], ["--ranks", "found 0", "8 lanes"]),
        (["--step", 2, "--ranks", 3], ["--ranks", "found 3", "8 lanes"]),
        (["--step", 2, "--rank", 2, "--ranks", 2], ["--rank", "found 2", "0 to 1"]),
        (["--step", 2, "--rank", 0, "--ranks", 8], ["--ranks", "found 8", "4 rows"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, words, made, capsys):
    code, text = said(capsys, "show", made[0], *argv)
    assert code == 2 and text.count("\n") == 1 and all(word in text for word in words), text


def test_a_folder_without_a_run_and_a_step_after_the_end_of_the_data_are_rejected(tmp_path, flags, capsys):
    code, text = said(capsys, "show", tmp_path, "--step", 1)
    assert code == 2 and "no file config.toml" in text
    code, text = said(capsys, "verify", tmp_path, tmp_path)
    assert code == 2 and "no file metrics.jsonl" in text
    write_run(tmp_path / "run", *flags, "--data.epochs=1")
    code, text = said(capsys, "show", tmp_path / "run", "--step", 500)
    assert code == 2 and "--step: found 500, must be below" in text and "ends" in text


def test_runs_are_compared_up_to_the_last_step_both_logged(made, run, capsys):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]) + '{"step": 8, "data_di')  # cut by a kill
    code, text = said(capsys, "verify", made[0], run)
    assert code == 0 and "the same data up to step 6" in text


def test_the_first_step_at_which_runs_differ_is_named(made, run, tmp_path, flags, capsys):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    changed = [json.loads(line) | ({"data_digest": "0" * 16} if i > 1 else {}) for i, line in enumerate(lines)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in changed))
    code, text = said(capsys, "verify", made[0], run)
    assert code == 1 and "at step 6, the same up to step 4" in text
    write_run(tmp_path / "other", *flags, "--debug.seed=7")
    code, text = said(capsys, "verify", made[0], tmp_path / "other")
    assert code == 1 and "at step 2, and no logged step" in text


def test_runs_that_logged_no_common_step_cannot_be_compared(made, run, capsys):
    (run / "metrics.jsonl").write_text('{"step": 3, "data_digest": "00"}\n{"step": 4, "validation/loss": 1.0}\n')
    code, text = said(capsys, "verify", made[0], run)
    assert code == 2 and "no step was logged by both" in text


@pytest.mark.slow
def test_a_real_run_on_two_ranks_that_accumulates_skips_and_resumes_is_decoded_exactly(tmp_path, texts, capsys):
    model = write_config(tmp_path, "llama")

    def job(name, *more):
        return [
            *SMALL,
            *(f"--model.config={model}", f"--job.dump_folder={tmp_path / name}", "--training.local_batch_size=2"),
            *("--training.global_batch_size=8", f"--training.dataset={texts}/a.jsonl,{texts}/b.jsonl"),
            *("--checkpoint.interval=3", "--checkpoint.no_export", "--lr_scheduler.total_steps=10", *more),
        ]

    skip = "--data.skip=3-4,8"
    train_each([job("run", "--training.steps=4", skip), job("whole", "--training.steps=10")], ranks=2)
    train_each([job("run", "--training.steps=8", skip), job("other", "--training.steps=8", skip)], ranks=1)
    assert said(capsys, "verify", tmp_path / "run", tmp_path / "other")[0] == 0
    code, text = said(capsys, "verify", tmp_path / "run", tmp_path / "whole")
    assert code == 1 and "at step 3, the same up to step 2" in text
    for step, unskipped in ((2, 2), (3, 5), (5, 7), (6, 9)):
        found = replay(tmp_path / "run", step)
        assert found.found == found.expected and len(found.rows) == 8
        expected = replay(tmp_path / "whole", unskipped)
        assert [row.tokens.tolist() for row in found.rows] == [row.tokens.tolist() for row in expected.rows]


@pytest.mark.parametrize("content", ["", "[]", '{"device": 5}', '{"device": {"ranks": "two"}}', "[" * 100_000, None])
def test_a_damaged_record_of_the_environment_is_done_without(content, run, capsys):
    path = run / "environment.json"
    path.unlink()
    if content is None:
        os.mkfifo(path)
    else:
        path.write_text(content)
    assert said(capsys, "show", run, "--step", 4)[0] == 0


@pytest.mark.parametrize(
    "content", ["checkpoint = 5", "[checkpoint]\nfolder = 5", "[job", "a = " + "[" * 100_000, "x" * 10]
)
def test_a_damaged_config_of_a_run_is_one_line(content, run, capsys):
    (run / "config.toml").write_text(content)
    code, text = said(capsys, "show", run, "--step", 4)
    assert code == 2 and text.count("\n") == 1 and "config.toml" in text
