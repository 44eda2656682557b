import pytest

from flame.data.order import Order
from flame.errors import UserError


def order(skip=(), **change):
    return Order(**{"lanes": 8, "window": 16, "seed": 0, "step": 4, **change}, skip=skip)


def rejected(order, saved, sequence):
    """What the steps to skip are and must be, as far as the checkpoint has read."""
    with pytest.raises(UserError) as error:
        order.check(saved, sequence)
    assert error.value.setting == "--data.skip"
    return error.value.found.split()[0], error.value.allowed.removesuffix(", which were skipped")


def test_the_sequences_of_skipped_steps_are_known():
    made = order([(2, 3), (5, 5)])
    assert [sequence for sequence in range(24) if made.skips(sequence)] == [*range(4, 12), *range(16, 20)]
    assert {sequence: names for sequence in range(24) if (names := made.skipped_from(sequence))} == {
        4: ["2-3"],
        16: ["5-5"],
    }


def test_steps_after_a_checkpoint_may_be_skipped_and_the_skipped_steps_before_it_may_not_change():
    saved = order([(2, 3)]).dump(12)
    order([(2, 3), (5, 5)]).check(saved, 12)
    for skip, asked in (((), "none"), ([(1, 3)], "1-3"), ([(2, 2)], "2-2")):
        assert rejected(order(skip), saved, 12) == (asked, "2-3")


def test_a_checkpoint_inside_a_range_knows_the_part_that_was_skipped():
    saved = order([(2, 3)]).dump(8)
    order([(2, 2), (9, 9)]).check(saved, 8)
    assert rejected(order([(3, 3)]), saved, 8) == ("none", "2-2")
