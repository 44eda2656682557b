"""All ranks act on what one of them finds, however long it takes; a file that one cannot read stops all of them."""

import subprocess
import sys

import pytest

from tests.launch import REPO, environment


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """The lines that two ranks print."""
    command = [sys.executable, str(REPO / "tests/checkpoint/waiting.py"), str(tmp_path_factory.mktemp("waiting"))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))


def test_the_ranks_wait_longer_than_their_timeout_for_one_that_hashes(lines):
    assert [line for line in lines if "resumes" in line] == ["rank 0 resumes step 4", "rank 1 resumes step 4"]


def test_only_rank_0_lists_the_checkpoints(lines):
    assert "rank 0 lists the checkpoints: True" in lines and "rank 1 lists the checkpoints: False" in lines


def test_a_file_that_one_rank_cannot_read_stops_all_of_them(lines):
    found = [line for line in lines if "step-6/b: cannot be read (Input/output error)" in line]
    assert len(found) == 2 and all("may be intact" in line for line in found)


def test_an_error_of_rank_0_stops_all_of_them(lines):
    found = [line for line in lines if "--job.dump_folder: [Errno 17] File exists: " in line]
    assert len(found) == 2
