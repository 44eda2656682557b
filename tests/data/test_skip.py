"""Data around a loss spike is left out exactly, on any number of ranks and workers, and across a resume."""

import json

import pytest

from flame.config.schema import Data, Training
from flame.data.inspect import replay
from flame.data.loader import check_skip
from flame.data.source import Source
from flame.errors import UserError
from tests.data.fakes import Bytes, Texts, loader, take, three
from tests.data.test_inspect import BATCH, STEPS, flags, texts, write_run  # noqa: F401 - fixtures

SKIP = [(3, 5), (9, 9)]
LEFT = [step for step in range(1, 25) if step not in (3, 4, 5, 9)]


def rows(world=1, **options):
    """{step of the data: its rows} as any number of ranks are fed them, without the skipped steps; and the states."""
    loaders = [loader(three(), rank, world, batch=4 // world, **options) for rank in range(world)]
    iterators = [iter(each) for each in loaders]
    found = {}
    for step in LEFT if "skip" in options else range(1, 25):
        batches = [take(iterator, 1)[0]["input"] for iterator in iterators]
        found[step] = [row for same in zip(*batches, strict=True) for row in same]
    return found, {key: value for each in loaders for key, value in each.state_dict().items()}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_steps_named_are_left_out_and_nothing_else_changes(world, workers):
    whole, _ = rows()
    found, _ = rows(world, workers=workers, skip=SKIP)
    assert found == {step: whole[step] for step in LEFT}


def test_a_step_of_several_batches_is_left_out_whole():
    whole, _ = rows()
    fed = take(iter(loader(three(), batch=2, global_batch_size=4, skip=SKIP)), 2 * len(LEFT))
    assert [row for batch in fed for row in batch["input"]] == [row for step in LEFT for row in whole[step]]


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4, 5, 6, 12])
def test_a_run_resumed_before_in_or_after_skipped_steps_continues_as_the_uninterrupted_one(k):
    expected = take(iter(loader(three(), skip=SKIP)), len(LEFT))
    before = loader(three(), skip=SKIP)
    take(iter(before), k)
    state = json.loads(json.dumps(before.state_dict()))
    after = loader(three(), skip=SKIP, workers=2)
    after.load_state_dict(state)
    assert take(iter(after), len(LEFT) - k) == expected[k:]


def test_steps_to_come_may_be_named_on_resume_and_steps_done_may_not_be_changed():
    before = loader(three(), skip=[(3, 5)])
    take(iter(before), 4)  # steps 1, 2, 6 and 7
    state = before.state_dict()
    loader(three(), skip=[(3, 5), (8, 8), (12, 20)]).load_state_dict(state)
    for asked, named in (([], "none"), ([(3, 6)], "3-6"), ([(3, 4)], "3-4"), ([(3, 5), (7, 8)], "3-5,7-7")):
        with pytest.raises(UserError) as error:
            loader(three(), skip=asked).load_state_dict(state)
        assert error.value.setting == "--data.skip"
        assert error.value.found.startswith(f"{named} ") and error.value.allowed.startswith("3-5,")


def test_a_checkpoint_without_a_record_of_skipped_steps_had_none():
    before = loader(three())
    take(iter(before), 4)
    state = before.state_dict()
    state["order"] = json.dumps({key: value for key, value in json.loads(state["order"]).items() if key != "skipped"})
    loader(three(), skip=[(5, 6)]).load_state_dict(state)
    with pytest.raises(UserError) as error:
        loader(three(), skip=[(4, 4)]).load_state_dict(state)
    assert error.value.found.startswith("4-4 ") and error.value.allowed.startswith("none,")


def test_a_range_to_skip_that_is_many_epochs_is_rejected_rather_than_read():
    training = Training(local_batch_size=2, seq_len=24)
    for last in (10**15, 10**17):
        with pytest.raises(UserError) as error:
            check_skip(three(), Bytes(), training, Data(skip=f"3-{last}"), dp_degree=2)
        assert (error.value.setting, error.value.found) == ("--data.skip", f"3-{last}")
    check_skip(three(), Bytes(), training, Data(skip=f"3-{10**15}", epochs=2), dp_degree=2)  # which end by themselves
    check_skip(three(), Bytes(), training, Data(skip=f"{10**15}"), dp_degree=2)


def test_an_epoch_to_skip_is_allowed_where_the_few_rows_read_are_a_hundredth_of_the_others(monkeypatch):
    monkeypatch.setattr(Source, "head", ["a" * 20] * 16)
    documents = ["a" * 2000] * 1000
    epoch = sum(map(len, documents)) // (4 * 24)
    source, training = Source("a", 1.0, Texts(documents)), Training(local_batch_size=2, seq_len=24)
    check_skip([source], Bytes(), training, Data(skip=f"3-{3 + epoch // 2}"), dp_degree=2)


@pytest.mark.parametrize("step", [1, 4, 8])
def test_a_run_that_skipped_steps_is_decoded_exactly(step, tmp_path, flags, texts):  # noqa: F811 - fixtures
    whole = write_run(tmp_path / "whole", *flags)
    fed = write_run(tmp_path / "run", *flags, "--data.skip=2-3,5")
    kept = [s for s in range(1, STEPS + 4) if s not in (2, 3, 5)]
    assert all(fed[at] == whole[s] for at, s in zip(range(1, STEPS + 1), kept, strict=True) if s <= STEPS)
    found = replay(tmp_path / "run", step)
    assert [row.tokens[:-1].tolist() for row in found.rows] == fed[step]
    assert found.first == (kept[step - 1] - 1) * BATCH
    assert found.found == found.expected is not None
