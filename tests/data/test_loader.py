"""The law of resume: take k, save, take the rest; restore, take the rest: the same."""

import gc
import json
import os
import threading
import time
from itertools import islice, pairwise

import numpy as np
import pytest
import torch.distributed.checkpoint as dcp

from flame.config.parser import JobConfig
from flame.data.cursor import encode
from flame.data.ledger import digest_batch
from flame.data.loader import build_dataloader
from flame.data.source import Source, build_sources
from flame.data.tokenize import build_tokenizer
from flame.errors import UserError
from tests.data.fakes import EOS, Bytes, Tape, Texts, documents, loader, one, take, three

TOTAL = 150  # batches: several windows and epochs of every source


def rows(sources, world, steps, states=None, **options):
    """The run's rows in their global order, from all ranks, and the states merged as a checkpoint merges them."""
    loaders = [loader(sources(), rank, world, batch=8 // world, **options) for rank in range(world)]
    if states is not None:
        for each in loaders:
            each.load_state_dict(states)
    iterators = [iter(each) for each in loaders]
    found = []
    for _ in range(steps):
        batches = [take(iterator, 1)[0]["input"] for iterator in iterators]
        found += [row for same in zip(*batches, strict=True) for row in same]
    return found, {key: value for each in loaders for key, value in each.state_dict().items()}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sources", [one, three])
@pytest.mark.parametrize("kind", [Texts, Tape])
def test_a_restored_loader_continues_where_the_saved_one_was(workers, sources, kind):
    whole = iter(loader(sources(kind), workers=workers, varlen=True))
    expected = take(whole, TOTAL)
    whole.close()
    epochs = 0.0
    for k in (0, 1, 7, 23, 130):
        before = loader(sources(kind), workers=workers, varlen=True)
        running = iter(before)
        assert take(running, k) == expected[:k]
        state = json.loads(json.dumps(before.state_dict()))
        epochs = before.counts()["a"][1]
        running.close()
        after = loader(sources(kind), workers=2 - workers, varlen=True)
        assert after.state_dict().keys() == state.keys()
        after.load_state_dict(state)
        assert after.state_dict() == state
        resumed = iter(after)
        assert take(resumed, TOTAL - k) == expected[k:], f"saved after {k}"
        resumed.close()
    assert epochs > 1, "the law was not put to the test past an epoch"


@pytest.mark.parametrize("kind", [Texts, Tape])
def test_the_runs_rows_are_the_same_on_any_number_of_ranks_and_across_a_change_of_it(kind):
    def sources():
        return three(kind)

    expected, _ = rows(sources, 1, 40)
    assert rows(sources, 2, 40)[0] == expected
    assert rows(sources, 4, 40, workers=2)[0] == expected
    first, state = rows(sources, 2, 13)
    second, state = rows(sources, 1, 11, state)
    third, _ = rows(sources, 4, 16, state)
    assert first + second + third == expected


def digests(steps, size, world=1, batch=None, states=None, **options):
    """The digest of each step of so many sequences, summed over ranks and microbatches; and the merged states."""
    batch = batch or size // world
    options |= {"global_batch_size": size, "varlen": True}
    loaders = [loader(three(), rank, world, batch, **options) for rank in range(world)]
    for each in loaders if states else ():
        each.load_state_dict(states)
    iterators, found = [iter(each) for each in loaders], []
    for _ in range(steps):
        total = 0
        for _ in range(size // (world * batch)):
            for each, iterator in zip(loaders, iterators, strict=True):
                inputs, labels = next(iterator)
                total += each.digest
        found.append(total % 2**64)
        if world * batch == size == batch:
            assert found[-1] == digest_batch(inputs["input"], labels, range(size)) % 2**64
    return found, {key: value for each in loaders for key, value in each.state_dict().items()}


@pytest.mark.parametrize("world, batch, workers", [(1, 2, 0), (2, 4, 2), (2, 1, 0), (4, 1, 0)])
def test_the_digests_of_a_step_add_up_to_the_same_in_every_layout(world, batch, workers):
    layout = {"world": world, "batch": batch, "workers": workers}
    for skip in ([], [(2, 3), (6, 6)]):
        assert digests(5, 8, skip=skip, **layout)[0] == digests(5, 8, skip=skip)[0]
    _, state = digests(5, 8)
    expected, _ = digests(4, 16, states=state)  # resumed amid what would be a step of this size
    assert digests(4, 16, states=state, **layout)[0] == expected


@pytest.mark.parametrize("kind", [Texts, Tape])
def test_every_row_is_read_once_an_epoch_and_each_epoch_has_another_order(kind):
    texts = documents("a", 50, 20)
    run = loader([Source("a", 1.0, kind(texts))], batch=1, lanes=1)
    tokens = [
        t
        for row in take(iter(run), 3 * sum(len(t) + 1 for t in texts) // 25)
        for t in [*row["input"][0], row["labels"][0][-1]]
    ]
    read = bytes(t if t < 256 else 10 for t in tokens).decode().split("\n")
    first, second = read[:50], read[50:100]
    assert sorted(first) == sorted(second) == sorted(texts)
    assert first != texts and first != second


def test_the_shares_of_tokens_are_the_ones_asked_for_from_early_on():
    sources = [
        Source(name, weight, Texts(documents(name, 400, length)))
        for name, weight, length in (("s", 0.5, 50), ("m", 0.3, 500), ("l", 0.2, 5000))
    ]
    run = loader(sources, batch=64, seq_len=512, lanes=64)
    running = iter(run)
    for steps, tolerance in ((4, 0.05), (60, 0.015)):
        take(running, steps)
        counts = {name: tokens for name, (tokens, _) in run.counts().items()}
        total = sum(counts.values())
        for source in sources:
            assert abs(counts[source.name] / total - source.weight) < tolerance, (steps, counts)


def test_new_weights_hold_from_the_restart_and_sources_stay_where_they_were():
    def sources(weights):
        lengths = {"a": 40, "b": 90, "c": 200, "d": 60}
        return [Source(n, w, Texts(documents(n, 3000, lengths[n]))) for n, w in weights.items()]

    before = loader(sources({"a": 0.5, "b": 0.3, "c": 0.2}), batch=8)
    take(iter(before), 200)
    after = loader(sources({"d": 0.3, "c": 0.5, "b": 0.2}), batch=8)  # a is gone, d is new, all in another order
    after.load_state_dict(before.state_dict())
    assert after.counts()["b"] == before.counts()["b"] and after.counts()["d"] == (0, 0.0)
    start = after.counts()
    take(iter(after), 400)
    gained = {name: tokens - start[name][0] for name, (tokens, _) in after.counts().items()}
    for name, share in (("d", 0.3), ("c", 0.5), ("b", 0.2)):
        assert abs(gained[name] / sum(gained.values()) - share) < 0.015, gained


def test_counts_add_up_to_the_tokens_handed_out_and_rows_without_text_are_counted():
    texts = [text for pair in zip(documents("a", 40, 20), [None, ""] * 20, strict=True) for text in pair]
    run = loader([Source("a", 1.0, Texts(texts))], workers=2)
    take(iter(run), 30)
    tokens, epochs = run.counts()["a"]
    assert tokens == 30 * 4 * 25
    size = sum(len(text) + 1 for text in texts if text)
    assert abs(epochs - tokens / size) < 0.3
    skipped, read, _ = run.skipped()["a"]
    assert skipped == pytest.approx(40 * epochs, rel=0.25) and read == pytest.approx(80 * epochs, rel=0.25)
    assert {row.reason for row in run.noted()["a"]} == {"null", "empty"} and len(run.noted()["a"]) == 5
    assert all(texts[int(row.place.split()[1])] in ("", None) for row in run.noted()["a"])


def test_the_state_of_a_lane_is_small_and_holds_no_text():
    run = loader(three(), batch=8)
    take(iter(run), 50)
    lanes = [value for key, value in run.state_dict().items() if key.startswith("lane_")]
    assert len(lanes) == 8 and max(map(len, lanes)) < 400
    assert not any(".." in lane or "<" in lane for lane in lanes)


def test_a_distributed_checkpoint_holds_the_state_and_gives_other_ranks_their_lanes(tmp_path):
    saved = loader(three(Tape), batch=8)
    running = iter(saved)
    take(running, 9)
    dcp.save({"dataloader": saved}, checkpoint_id=tmp_path, no_dist=True)
    expected = take(running, 5)
    halves = [loader(three(Tape), rank, 2) for rank in range(2)]
    for half in halves:
        dcp.load({"dataloader": half}, checkpoint_id=tmp_path, no_dist=True)
    batches = [take(iter(half), 5) for half in halves]
    for whole, even, odd in zip(expected, *batches, strict=True):
        assert (whole["input"][::2], whole["input"][1::2]) == (even["input"], odd["input"])


class Begun(Bytes):
    """With a BOS, 257, before each document."""

    prefix, vocab_size = (257,), 258


def test_a_bos_is_put_before_each_document_that_has_none():
    texts = ["text", np.array([1, 2, EOS]), np.array([257, 3]), np.array([257, EOS]), "\u200b"]
    encoded = [ids.tolist() for ids in encode(Begun(), texts, "a")]
    assert encoded == [[257, *b"text", EOS], [257, 1, 2, EOS], [257, 3, EOS], [], []]
    run = loader(three(), encoder=Begun(), lanes=1, batch=1, varlen=True)
    for fed, _ in islice(run, 50):
        tokens, starts = fed["input"][0].tolist(), (fed["positions"][0] == 0).nonzero().flatten().tolist()
        assert [i for i, token in enumerate(tokens) if token == 257] == starts[starts[0] == 0 and tokens[0] != 257 :]


@pytest.mark.parametrize("encoders", [(Bytes(), Begun()), (Begun(), Bytes())])
def test_a_bos_that_is_added_or_left_out_later_moves_no_other_token(encoders):
    def read(encoder, count, state=None):
        run = loader(one(), encoder=encoder, lanes=1, batch=1)
        run.load_state_dict(state or {})
        tokens = [token for _ in islice(run, count) for token in run.rows[0].tokens.tolist()]
        return [token for token in tokens if token != 257], run

    for count in range(1, 12):
        before, run = read(encoders[0], count)
        after, _ = read(encoders[1], 12, run.state_dict())
        whole, _ = read(Bytes(), 30)
        text = "".join(chr(token) for token in before + after)
        assert text in "".join(chr(token) for token in whole)


def test_a_run_goes_on_with_what_made_its_ids():
    class Switched(Bytes):
        engine = "fast"

        def use(self, engine):
            self.engine = engine

    state = loader(one()).state_dict()
    encoder = Switched()
    loader(one(), encoder=encoder).load_state_dict(state)
    assert encoder.engine == "bytes"
    order = json.loads(state["order"])
    del order["engine"], order["prefix"]  # as an older version left it
    encoder = Switched()
    loader(one(), encoder=encoder).load_state_dict(state | {"order": json.dumps(order)})
    assert encoder.engine == "fast"


def test_batches_read_ahead_are_not_in_the_state():
    class Counting(Bytes):
        tokens = 0

        def encode_batch(self, texts):
            self.tokens += sum(map(len, texts))
            return super().encode_batch(texts)

    encoders, states = [Counting(), Counting()], []
    for encoder, workers in zip(encoders, (0, 2), strict=True):
        run = loader(three(), encoder=encoder, workers=workers, prefetch=4)
        running = iter(run)
        take(running, 3)
        states.append(run.state_dict())
    deadline = time.monotonic() + 60
    while encoders[1].tokens <= encoders[0].tokens:
        assert time.monotonic() < deadline, "nothing was read ahead"
        time.sleep(0.01)
    assert run.state_dict() == states[1] == states[0] and states[0]["sequence"] == 12
    running.close()


class Broken(Texts):
    def texts(self, indices):
        if 41 in indices:
            raise OSError("disk on fire")
        return super().texts(indices)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_worker_is_raised_to_the_reader(workers):
    run = loader([Source("a", 1.0, Broken(documents("a", 90, 20)))], workers=workers)
    with pytest.raises(OSError, match="disk on fire"):
        take(iter(run), 100)


def test_threads_end_with_the_iterator():
    before = threading.active_count()
    run = loader(three(), workers=3)
    running = iter(run)
    take(running, 2)
    assert threading.active_count() == before + 3
    running.close()
    assert threading.active_count() == before
    other = iter(run)
    take(other, 1)
    del run, other
    gc.collect()
    assert threading.active_count() == before


@pytest.mark.parametrize("lanes, seq_len, batches", [(8, 24, 8), (64, 24, 64), (64, 65_535, 4)])
def test_workers_read_their_batches_ahead_and_four_rows_of_each_lane_unless_rows_are_long(lanes, seq_len, batches):
    assert loader(one(), lanes=lanes, seq_len=seq_len, workers=2, prefetch=2).ahead == batches
    assert loader(one(), lanes=lanes, seq_len=seq_len, workers=0).ahead == 0


def test_workers_are_the_threads_that_tokenize_unless_the_user_wants_otherwise(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    loader(one(), workers=2)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    loader(one(), workers=0)
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    loader(one(), workers=2)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_a_stale_iterator_raises():
    run = loader(one())
    old = iter(run)
    take(old, 1)
    take(iter(run), 1)
    with pytest.raises(RuntimeError, match="stale"):
        next(old)


@pytest.mark.parametrize(
    "change, flag, saved",
    [({"lanes": 4}, "--data.lanes", 8), ({"window": 8}, "--data.window", 16), ({"seed": 3}, "--debug.seed", 0)],
)
def test_a_checkpoint_in_another_order_is_rejected(change, flag, saved):
    with pytest.raises(UserError) as error:
        loader(one(), **change).load_state_dict(loader(one()).state_dict())
    assert (error.value.setting, error.value.found) == (flag, *change.values())
    assert error.value.allowed.startswith(f"{saved},")


def test_a_checkpoint_whose_sequences_the_ranks_do_not_divide_is_rejected():
    before = loader(one(), batch=1)
    take(iter(before), 3)
    with pytest.raises(UserError) as error:
        loader(one(), 0, 2).load_state_dict(before.state_dict())
    assert error.value.found == 2 and "divisor of the 3 sequences" in error.value.allowed


class Short(Bytes):
    """The first ten ids alone."""

    def encode_batch(self, texts):
        return [ids[:10] for ids in super().encode_batch(texts)]


def test_a_tokenizer_that_has_changed_since_the_checkpoint_is_rejected():
    run = loader([Source("a", 1.0, Texts(["x" * 1000]))], lanes=1)
    take(iter(run), 5)
    other = loader([Source("a", 1.0, Texts(["x" * 1000]))], lanes=1, encoder=Short())
    other.load_state_dict(run.state_dict())
    with pytest.raises(UserError) as error:
        take(iter(other), 1)
    assert error.value.setting == "source a" and "not the text" in error.value.hint


@pytest.mark.parametrize("kind", [Texts, Tape])
def test_other_data_under_the_name_of_a_source_is_rejected_and_other_sources_are_not(kind):
    run = loader([Source("a", 1.0, kind(["x"] * 40)), Source("b", 1.0, kind(["y"] * 40))])
    take(iter(run), 5)
    loader([Source("a", 3.0, kind(["x"] * 40)), Source("c", 1.0, kind(["z"] * 9))]).load_state_dict(run.state_dict())
    for rows in (["X", *["x"] * 39], [None, *["x"] * 39], *([["x"] * 41] if kind is Texts else [])):
        with pytest.raises(UserError) as error:
            loader([Source("a", 1.0, kind(rows)), Source("b", 1.0, kind(["y"] * 40))]).load_state_dict(run.state_dict())
        assert error.value.setting == "source a" and "in the checkpoint" in error.value.allowed


def test_a_checkpoint_that_records_no_data_is_reported_and_rows_that_its_counts_rule_out_are_rejected(caplog):
    run = loader([Source("a", 1.0, Texts(documents("a", 90, 20)))])
    read = iter(run)
    for batches in (1, 60):
        take(read, batches)
        state = run.state_dict()
        order = json.loads(state["order"])
        state["order"] = json.dumps({key: order[key] for key in order if key != "data"})
        loader([Source("a", 1.0, Texts(documents("a", 90, 20)))]).load_state_dict(state)
        assert "older flame" in caplog.text
    for other in (45, 180):
        with pytest.raises(UserError) as error:
            loader([Source("a", 1.0, Texts(documents("a", other, 20)))]).load_state_dict(state)
        assert (error.value.setting, error.value.found) == ("source a", f"{other} rows")


@pytest.mark.parametrize("rows", [Texts(["", None] * 9), Tape([""] * 9), Tape([])])
def test_a_source_without_any_text_ends_the_run_instead_of_searching_for_ever(rows):
    with pytest.raises(UserError) as error:
        take(iter(loader([Source("a", 1.0, rows)])), 1)
    assert error.value.setting == "source a"


def test_varlen_batches_agree_with_their_tokens():
    run = loader(three(), varlen=True, context_len=10)
    for batch in take(iter(run), 20):
        flat = [t for row in batch["input"] for t in row]
        bounds = batch["cu_seqlens"]
        assert bounds[0] == 0 and bounds[-1] == len(flat) == 4 * 24
        for begin, end in pairwise(bounds):
            assert 0 < end - begin <= 10
            assert 256 not in flat[begin : end - 1], "a piece holds one document"
        positions = [p for row in batch["positions"] for p in row]
        assert positions == [i for begin, end in pairwise(bounds) for i in range(end - begin)]
        labels = [t for row in batch["labels"] for t in row]
        assert all((label == -100) == (token == 256) for token, label in zip(flat, labels, strict=True))


def test_a_job_of_the_standard_library_in_bytes_runs_as_configured():
    job = JobConfig()
    job.training.seq_len, job.training.local_batch_size = 128, 2
    sources = build_sources(job.training, job.data)
    run = build_dataloader(
        sources=sources, dp_world_size=2, dp_rank=1, tokenizer=build_tokenizer("byte"), job_config=job
    )
    running = iter(run)
    fed, labels = next(running)
    running.close()
    assert list(fed) == ["input"] and fed["input"].shape == labels.shape == (2, 128)
    assert fed["input"][:, 1:].equal(labels[:, :-1])
    assert list(run.counts()) == ["stdlib"]
    assert sorted(k for k in run.state_dict() if k.startswith("lane"))[0] == "lane_001"


def test_context_len_without_varlen_changes_nothing():
    batches = []
    for context_len in (None, 16):
        job = JobConfig()
        job.training.context_len, job.training.seq_len = context_len, 64
        sources = build_sources(job.training, job.data)
        loader = build_dataloader(sources=sources, dp_world_size=1, dp_rank=0, tokenizer=Bytes(), job_config=job)
        batches.append(next(iter(loader)))
    (one, one_labels), (other, other_labels) = batches
    assert one.keys() == other.keys() == {"input"}
    assert one["input"].equal(other["input"]) and one_labels.equal(other_labels)
