"""Shares of tokens by deficits."""

import numpy as np
import pytest

from flame.data.lane import charge, initial_deficits, normalize, pick

SHARES = (0.5, 0.3, 0.2)


def test_weights_become_shares():
    assert normalize([2, 1, 1]) == (0.5, 0.25, 0.25)


def test_the_largest_deficit_for_its_share_is_next_and_pays_for_its_tokens():
    deficits = (10.0, 9.0, -19.0)
    assert pick(deficits, SHARES) == 1
    assert charge(deficits, SHARES, 1, 100) == (60.0, 9.0 + 30 - 100, 1.0)


@pytest.mark.parametrize("lanes", [4, 8, 64])
def test_the_first_picks_of_the_lanes_have_the_shares_even_for_few_lanes(lanes):
    first = [pick(initial_deficits(lane, SHARES, (50, 500, 5000)), SHARES) for lane in range(lanes)]
    counts = np.bincount(first, minlength=3) / lanes
    assert np.abs(counts - SHARES).max() <= 1.5 / lanes + 0.02


def test_a_source_alone_is_always_next():
    deficits = initial_deficits(5, (1.0,), (10,))
    assert pick(deficits, (1.0,)) == 0 and charge(deficits, (1.0,), 0, 7) == (0.0,)


def served(phased, until, lengths=(50, 500, 5000), lanes=64):
    """Tokens each source gave to all lanes by the time that each lane had so many."""
    given = np.zeros(3)
    for lane in range(lanes):
        deficits, total = initial_deficits(lane if phased else 0, SHARES, lengths) if phased else (0.0,) * 3, 0
        while total < until:
            source = pick(deficits, SHARES)
            given[source] += min(lengths[source], until - total)
            total += lengths[source]
            deficits = charge(deficits, SHARES, source, lengths[source])
    return given / given.sum()


@pytest.mark.parametrize("until", [250, 1000, 4000, 8000, 16000, 40000])
def test_long_documents_do_not_upset_the_shares_at_any_time(until):
    assert np.abs(served(True, until) - SHARES).max() < 0.035


def test_without_phases_they_would():
    assert np.abs(served(False, 4000) - SHARES).max() > 0.3
