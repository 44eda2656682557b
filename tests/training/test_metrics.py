"""A full disk stops TensorBoard with one warning."""

import threading
from functools import partial

import pytest

from flame.training.metrics import _report_once


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
