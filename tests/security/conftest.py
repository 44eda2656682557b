"""Fixtures of the tests that no code runs."""

import tarfile
from pathlib import Path

import pytest

from tests.checkpoint.conftest import one_rank

__all__ = ["one_rank"]


@pytest.fixture
def run(tmp_path):
    """A run of another machine: three steps of a tiny Llama."""
    with tarfile.open(Path(__file__).parents[1] / "training/run-0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    config = tmp_path / "run/config.toml"
    config.write_text(config.read_text().replace("/tmp/flame-0.1.0", str(tmp_path)))
    return tmp_path / "run"
