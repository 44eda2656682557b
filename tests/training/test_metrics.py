"""A full disk stops TensorBoard with one warning; the peak that MFU divides by."""

import threading
from functools import partial
from types import SimpleNamespace

import pytest

from flame.training.metrics import _report_once, known_peak_flops


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
