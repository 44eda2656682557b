"""What one rank finds, all act on, however long it takes; what one cannot read stops all, and is not passed over."""

import subprocess
import sys

import pytest

from tests.launch import REPO, environment


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """The lines that two ranks print."""
    command = [sys.executable, str(REPO / "tests/checkpoint/waiting.py"), str(tmp_path_factory.mktemp("waiting"))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))


def test_a_rank_that_hashes_for_longer_than_the_timeout_is_waited_for(said):
    assert [line for line in said if "resumes" in line] == ["rank 0 resumes step 4", "rank 1 resumes step 4"]


def test_a_file_that_one_rank_cannot_read_stops_all_of_them(said):
    found = [line for line in said if "step-6/b: cannot be read (Input/output error)" in line]
    assert len(found) == 2 and all("may be intact" in line for line in found)


def test_what_the_first_rank_could_not_do_stops_all_of_them(said):
    found = [line for line in said if "--job.dump_folder: [Errno 17] File exists: " in line]
    assert len(found) == 2
