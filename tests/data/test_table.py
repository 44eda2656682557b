"""A stream that fails now and then."""

import httpx
import pytest

from flame.data.source import Source
from flame.data.table import RetryingStream
from tests.data.fakes import Tape, documents, loader, take
from tests.launch import SMALL, metrics, train_each
from tests.tiny import write_config


class Flaky(Tape):
    """Fails before each of these rows, as many times as it says, in the middle of a window or at its start."""

    def __init__(self, rows, failures, error=ConnectionError):
        super().__init__(rows)
        self.failures, self.error = dict(failures), error

    def batches(self, size, mark=None):
        for batch, after in super().batches(size, mark):
            for row in range(after["row"] - len(batch), after["row"]):
                if self.failures.get(row):
                    self.failures[row] -= 1
                    raise self.error(f"row {row}")
            yield batch, after


def patient(rows, failures, waited, waits=(1, 2, 4), **options):
    return RetryingStream(Flaky(rows, failures, **options), "hub/data", waits, waited.append)


@pytest.mark.parametrize("error", [ConnectionError, TimeoutError, httpx.ReadTimeout])
def test_a_failed_stream_continues_at_the_same_row_after_longer_and_longer_waits(error, caplog):
    rows, waited = documents("a", 50, 10), []
    stream = patient(rows, {0: 2, 23: 3, 49: 1}, waited, error=error)
    assert list(stream.batches(7)) == list(Tape(rows).batches(7))
    assert waited == [1, 2, 1, 2, 4, 1]
    assert "hub/data: row 23; trying again at the same row in 4 s" in caplog.text


def test_a_stream_that_starts_at_a_mark_reads_no_row_before_it():
    rows, waited = documents("a", 50, 10), []
    mark = {"row": 14}
    assert list(patient(rows, {14: 1, 30: 1}, waited).batches(7, mark)) == list(Tape(rows).batches(7, mark))
    assert len(waited) == 2


def test_permanent_errors_and_the_last_of_too_many_failures_are_raised():
    waited = []
    with pytest.raises(FileNotFoundError):
        list(patient(documents("a", 9, 10), {3: 1}, waited, error=FileNotFoundError).batches(2))
    with pytest.raises(KeyError):
        list(patient(documents("a", 9, 10), {3: 1}, waited, error=KeyError).batches(2))
    assert waited == []
    with pytest.raises(ConnectionError):
        list(patient(documents("a", 9, 10), {3: 4}, waited).batches(2))
    assert waited == [1, 2, 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_a_failing_stream_is_fed_what_one_on_a_sound_stream_is(workers):
    rows, waited = documents("a", 90, 20), []
    sound = take(iter(loader([Source("a", 1.0, Tape(rows))])), 80)
    failures = {5: 3, 40: 2, 89: 1}
    assert take(iter(loader([Source("a", 1.0, patient(rows, failures, waited))], workers=workers)), 80) == sound
    assert sum(failures.values()) == len(waited)


@pytest.mark.slow
def test_the_seconds_that_a_step_waited_for_data_on_any_rank_are_in_the_metrics(tmp_path):
    job = [
        *(*SMALL, f"--job.dump_folder={tmp_path / 'run'}", f"--model.config={write_config(tmp_path, 'llama')}"),
        *("--training.steps=4", "--checkpoint.no_enable"),
    ]
    train_each([job], trainer="tests.faults:SlowData", ranks=2)
    waited = [record["data/wait_seconds"] for record in metrics(tmp_path / "run")]
    assert 1 <= waited[1] < 3 and max(waited[2:]) < 1
