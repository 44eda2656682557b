"""What the benchmark measures is what it says; how fast anything is, no test says."""

import itertools
import time

import pytest

from flame.config.parser import parse
from flame.data.__main__ import main
from flame.data.source import Source
from flame.data.tokenize import build_tokenizer
from scripts.benchmark.stream import Side, bench, compare, draw_texts, encode_repeatedly, iterate, weigh_state
from tests.data.fakes import Tape, Texts, documents, loader, three


def test_the_table_has_a_line_for_each_number_of_workers_and_the_costs(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n' * 200)
    flags = [f"--training.dataset={tmp_path}/a.jsonl", "--training.seq_len=64", "--data.lanes=8"]
    bench(parse([*flags, "--data.epochs=1", "--data.skip=1-1000000"]), seconds=0.01)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["workers", "0", "1", "2", "4"]
    assert all(float(line.split()[2]) > 0 for line in lines[1:5])
    assert [line.split(":")[0] for line in lines[5:]] == ["tokenizer alone", "state", "peak memory"]


def test_sources_without_text_are_rejected_in_one_line(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1, 2, 3]}\n' * 20)
    (tmp_path / "job.toml").write_text(f'[training]\ndataset = "{tmp_path}/a.jsonl"\n')
    assert main(["bench", str(tmp_path / "job.toml"), "--data.lanes", "8"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "token ids without text" in error


def test_a_ratio_is_that_of_tokens_a_second_and_slices_alternate():
    turns = []

    def side(name, tokens):
        def step():
            turns.append(name)
            time.sleep(0.002)
            return tokens

        return Side(step)

    pair = compare(side("a", 300), side("b", 100), seconds=0.02, slices=2)
    assert pair.ratio.wall == pytest.approx(3, rel=0.3)
    assert pair.one.wall > pair.other.wall > 0
    assert [name for name, _ in itertools.groupby(turns)] == ["a", "b"] * 3


def test_what_was_ready_before_the_clock_started_is_not_counted():
    ready, last = 0, -1.0

    def step():
        nonlocal ready, last
        if time.monotonic() - last > 0.2:
            ready = 5  # made while nobody asked
        if ready == 0:
            time.sleep(0.02)
        ready, last = max(0, ready - 1), time.monotonic()
        return 1

    assert compare(Side(step, ahead=5), Side(lambda: 1), seconds=0.1, slices=1).one.wall <= 50


def test_the_tokenizer_alone_is_given_the_text_of_the_mixture():
    sources = [Source("a", 0.75, Texts(documents("a", 900, 40))), Source("b", 0.25, Tape(documents("b", 900, 40)))]
    texts = draw_texts(sources, 8000)
    assert sum(map(len, texts)) == pytest.approx(8000, rel=0.05)
    assert sum(len(text) for text in texts if "<a" in text) == pytest.approx(6000, rel=0.05)
    tokenizer = build_tokenizer("byte")
    step = encode_repeatedly(tokenizer, texts[:70]).step
    assert [step(), step(), step()] == [len("".join(part)) for part in (texts[:64], texts[64:70], texts[:64])]


def test_the_stream_is_counted_in_tokens_and_its_state_weighed():
    stream = loader(three())
    assert iterate(stream).step() == 4 * 24
    size, seconds = weigh_state(stream)
    assert 100 < size < 8 * 1024 and 0 < seconds < 1
