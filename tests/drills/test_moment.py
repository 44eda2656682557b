"""A run is stopped where a drill wants to kill it."""

import os
import signal

import pytest

from flame.drills.moment import EXPORT, FIRST_SAVE, START, TRAINING, Moment, choose, stop_at


@pytest.mark.parametrize("times", [1, 2, 3, 4, 11, 30])
def test_kills_come_in_the_order_of_a_runs_life_and_reach_all_of_its_parts(times):
    chosen = choose(times)
    parts = [next(i for i, part in enumerate((START, FIRST_SAVE, TRAINING, EXPORT)) if m in part) for m in chosen]
    assert len(chosen) == times and parts == sorted(parts)
    assert len(set(parts)) == min(times, 4)
    if times == 30:
        assert set(chosen) == {*START, *FIRST_SAVE, *TRAINING, *EXPORT}


def test_a_process_stops_before_the_event_of_its_moment(tmp_path):
    (tmp_path / "file").touch()
    child = os.fork()
    if child == 0:
        stop_at(Moment("anywhere", "os.rename", r"/file\b", 2), tmp_path / "reached")
        os.rename(tmp_path / "file", tmp_path / "file.2")
        os.rename(tmp_path / "file.2", tmp_path / "file.3")  # no such word
        os.rename(tmp_path / "file.3", tmp_path / "file")
        os._exit(0)
    _, status = os.waitpid(child, os.WUNTRACED)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert os.WIFSTOPPED(status) and sorted(path.name for path in tmp_path.iterdir()) == ["file.2", "reached"]
