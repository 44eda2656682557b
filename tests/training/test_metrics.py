"""A full disk stops TensorBoard with one warning; the peak that MFU divides by, and whether microbatches fill it."""

import threading
from functools import partial
from types import SimpleNamespace

import pytest

from flame.training.metrics import _report_once, advise_rows, known_peak_flops


class Thread(threading.Thread):
    """A thread that fails."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def run(self):
        raise self.error


class Writer(Thread):
    """One of TensorBoard's."""


Writer.__module__ = "tensorboard.summary.writer.event_file_writer"


@pytest.mark.parametrize(
    "kind, error, reported", [(Writer, OSError, False), (Writer, ValueError, True), (Thread, OSError, True)]
)
def test_only_a_writer_that_finds_no_room_is_silent(kind, error, reported, monkeypatch):
    found = []
    monkeypatch.setattr(threading, "excepthook", partial(_report_once, found.append))
    thread = kind(error())
    thread.start()
    thread.join()
    assert bool(found) == reported


@pytest.mark.parametrize("name, peak", [("NVIDIA H20", 148e12), ("NVIDIA H20-3e", 148e12), ("NVIDIA H200", 989e12)])
def test_an_h20_is_not_taken_for_the_h100_that_lspci_shows(name, peak, monkeypatch):
    lines = f"1b:00.0 3D controller: NVIDIA Corporation GH100 [{name.removeprefix('NVIDIA ')}] (rev a1)"
    monkeypatch.setattr("torchtitan.tools.utils.subprocess.run", lambda *_, **__: SimpleNamespace(stdout=lines))
    assert known_peak_flops(name) == peak


def test_microbatches_that_a_gpu_computes_before_the_host_has_launched_the_next_are_told_how_many_rows_do():
    shared = (2048, 2.07e9, 24, 989e12)  # a model of 340M on an H100: 8.6 ms a row at half of its peak
    assert advise_rows(8, *shared) is None
    advice = advise_rows(1, *shared)
    assert all(words in advice for words in ("1 x 2,048 tokens of a microbatch take it 9 ms", "48 ms", "; 6 rows"))
    assert advise_rows(6, *shared) is None
