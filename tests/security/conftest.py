"""Fixtures of the tests that no code runs."""

from tests.checkpoint.conftest import one_rank

__all__ = ["one_rank"]
