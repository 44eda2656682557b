"""The end of the data: after --data.epochs readings, at the same step on any number of ranks and workers."""

import json
import subprocess
import sys
import threading

import pytest

from flame.data.source import Source
from tests.data.fakes import EOS, Tape, Texts, documents, loader, one, three
from tests.launch import SMALL, environment, metrics, train, trajectory
from tests.tiny import write_config


def uneven(kind=Texts):
    return [Source("a", 0.5, kind(documents("a", 100, 20))), Source("b", 0.5, kind(documents("b", 60, 20)))]


def steps(sources, world=1, batch=8, state=None, **options):
    """The rows of each step that all ranks can do, and the state they then agree on."""
    loaders = [loader(sources, rank, world, batch=batch // world, **options) for rank in range(world)]
    for each in loaders:
        each.load_state_dict(state or {})
    iterators = [iter(each) for each in loaders]
    done = []
    while True:
        positions = [each.position() for each in loaders]
        fed = [next(iterator, None) for iterator in iterators]
        if any(batch is None for batch in fed):
            for each, position in zip(loaders, positions, strict=True):
                each.rewind(position)
            for iterator in iterators:
                iterator.close()
            return done, {key: value for each in loaders for key, value in each.state_dict().items()}, loaders
        inputs = [list(map(tuple, (torch_input["input"].tolist()))) for torch_input, _ in fed]
        done.append([row for same in zip(*inputs, strict=True) for row in same])


@pytest.mark.parametrize("kind", [Texts, Tape])
@pytest.mark.parametrize("sources", [uneven, three])
def test_the_data_end_at_one_step_whatever_the_ranks_and_workers_and_leave_one_state(kind, sources):
    expected, state, _ = steps(sources(kind), epochs=2)
    assert len(expected) > 10
    before = threading.active_count()
    for world in (1, 2, 4):
        for workers in (0, 2):
            assert steps(sources(kind), world, epochs=2, workers=workers)[:2] == (expected, state)
    assert threading.active_count() == before


@pytest.mark.parametrize("epochs", [1, 3])
def test_every_document_is_read_so_many_times_but_for_the_tail_that_fills_no_row(epochs):
    texts = documents("a", 300, 20)
    (done, _, (run,)) = steps([Source("a", 1.0, Texts(texts))], batch=1, lanes=1, epochs=epochs)
    tokens = [token for step in done for token in step[0]]
    assert tokens.count(EOS) in range(epochs * 300 - 2 - len(done), epochs * 300 + 1)
    tokens, read = run.counts()["a"]
    size = epochs * sum(len(text) + 1 for text in texts)
    assert size - 25 < tokens <= size
    assert epochs - 2 / 300 < read <= epochs


def test_the_other_sources_share_the_tokens_when_one_is_exhausted():
    sources = [
        Source("short", 0.5, Texts(documents("s", 40, 20))),
        Source("m", 0.3, Texts(documents("m", 4000, 20))),
        Source("l", 0.2, Texts(documents("l", 4000, 20))),
    ]
    run = loader(sources, epochs=1)
    running = iter(run)
    for _ in range(50):
        next(running)
    start = run.counts()
    assert start["short"][1] == 1.0
    for _ in range(500):
        next(running)
    gained = {name: tokens - start[name][0] for name, (tokens, _) in run.counts().items()}
    assert gained["short"] == 0
    assert gained["m"] / sum(gained.values()) == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("kind", [Texts, Tape])
@pytest.mark.parametrize("sources", [one, uneven])
def test_a_restart_just_before_or_at_the_end_ends_alike(kind, sources):
    whole, end, _ = steps(sources(kind), epochs=2)
    run = loader(sources(kind), batch=8, epochs=2)
    running = iter(run)
    for _ in range(len(whole) - 1):
        next(running)
    eve = json.loads(json.dumps(run.state_dict()))
    running.close()
    assert steps(sources(kind), 2, state=eve, epochs=2, workers=2)[:2] == (whole[-1:], end)
    assert steps(sources(kind), 2, state=end, epochs=2)[:2] == ([], end)


@pytest.mark.parametrize("kind", [Texts, Tape])
def test_a_restart_with_more_epochs_continues_as_if_there_had_been_no_end(kind):
    endless = loader(one(kind), batch=8)
    running = iter(endless)
    first, end, _ = steps(one(kind), epochs=2)
    rest, _, _ = steps(one(kind), 2, state=end, epochs=4)
    assert len(rest) > len(first) / 2
    assert [list(map(tuple, next(running)[0]["input"].tolist())) for _ in first + rest] == first + rest


def test_fewer_epochs_than_were_read_end_at_once():
    run = loader(one(), epochs=3)
    running = iter(run)
    while run.counts()["a"][1] < 1.9:
        next(running)
    fewer = loader(one(), epochs=1)
    fewer.load_state_dict(run.state_dict())
    assert next(iter(fewer), None) is None


@pytest.mark.slow
def test_a_run_ends_with_its_data_on_two_ranks_and_continues_on_one_with_more_epochs(tmp_path):
    for name, count in (("a", 100), ("b", 60)):
        lines = [json.dumps({"text": text}) + "\n" for text in documents(name, count, 300)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))

    def job(folder, *more):
        return [
            *(*SMALL, f"--job.dump_folder={tmp_path / folder}", f"--model.config={write_config(tmp_path, 'llama')}"),
            *(f"--training.dataset={tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}", "--training.steps=100"),
            *("--training.global_batch_size=8", "--data.lanes=8", "--checkpoint.no_export"),
            *("--lr_scheduler.decay_ratio=0", *more),
        ]

    whole = train(*job("whole", "--data.epochs=2", "--training.local_batch_size=8"))
    assert whole.returncode == 0, whole.stderr[-2000:]
    half = train(*job("parts", "--data.epochs=1", "--training.local_batch_size=2"), ranks=2)
    assert half.returncode == 0, half.stderr[-2000:]
    status = json.loads((tmp_path / "parts" / "status.json").read_text())
    last = metrics(tmp_path / "parts")[-1]
    assert (status["status"], status["step"]) == ("data_exhausted", last["step"])
    assert (tmp_path / "parts" / "checkpoint" / f"step-{last['step']}" / ".metadata").exists()
    assert 0.8 < last["data/a/epoch"] <= 1 and 0.8 < last["data/b/epoch"] <= 1

    again = train(*job("parts", "--data.epochs=1", "--training.local_batch_size=8", "--data.exhausted_exit_code=1"))
    assert again.returncode == 1 and "data_exhausted at step" in again.stdout
    assert len(metrics(tmp_path / "parts")) == last["step"]
    more = train(*job("parts", "--data.epochs=2", "--training.local_batch_size=8"))
    assert more.returncode == 0, more.stderr[-2000:]
    steps_of_both = {len(trajectory(tmp_path / name)) for name in ("whole", "parts")}
    assert min(steps_of_both) > 1.5 * last["step"] and len(trajectory(tmp_path / "parts")) > last["step"]


@pytest.mark.slow
def test_the_exit_code_of_ended_data_waits_for_the_export(tmp_path):
    lines = [json.dumps({"text": text}) + "\n" for text in documents("a", 60, 300)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    flags = [
        *(*SMALL, f"--job.dump_folder={tmp_path / 'run'}", f"--model.config={write_config(tmp_path, 'llama')}"),
        *(f"--training.dataset={tmp_path / 'a.jsonl'}", "--training.local_batch_size=4", "--training.steps=100"),
        *("--data.lanes=8", "--data.epochs=1", "--data.exhausted_exit_code=1", "--lr_scheduler.decay_ratio=0"),
    ]
    command = [sys.executable, "-m", "flame.runtime.launch", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=localhost:0", "-m", "flame.train", *flags]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (done.returncode, status["status"]) == (1, "data_exhausted"), done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "hf" / f"step-{status['step']}" / "conversion_report.json").exists()


@pytest.mark.slow
def test_a_new_epoch_of_a_source_is_logged_once_and_data_that_fill_no_step_are_rejected(tmp_path):
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents("f", 40, 200)))
    job = [
        *(*SMALL, f"--model.config={write_config(tmp_path, 'llama')}", f"--training.dataset={tmp_path / 'few.jsonl'}"),
        *("--training.steps=20", "--data.lanes=8", "--checkpoint.interval=100", "--checkpoint.no_export"),
    ]
    endless = train(*job, f"--job.dump_folder={tmp_path / 'endless'}", ranks=2)
    assert endless.returncode == 0, endless.stderr[-2000:]
    epoch = metrics(tmp_path / "endless")[-1]["data/few/epoch"]
    assert epoch > 3
    assert endless.stdout.count("source few begins epoch") == int(epoch)
    none = train(*job, f"--job.dump_folder={tmp_path / 'none'}", "--data.epochs=1", "--data.lanes=64")
    assert none.returncode != 0 and "--data.epochs: 1 of the data does not fill one step" in none.stderr
