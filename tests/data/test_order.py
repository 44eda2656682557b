import pytest

from flame.data.order import Order
from flame.errors import UserError


def order(skip=(), **change):
    return Order(**{"lanes": 8, "window": 16, "seed": 0, "step": 4, **change}, skip=skip)


def test_the_sequences_of_skipped_steps_are_left_out():
    made = order([(2, 3), (5, 5)])
    assert [sequence for sequence in range(24) if made.leaves_out(sequence)] == [*range(4, 12), *range(16, 20)]
    assert {sequence: names for sequence in range(24) if (names := made.left_out_up_to(sequence))} == {
        12: ["2-3"],
        20: ["5-5"],
    }


def test_steps_behind_the_checkpoint_may_be_skipped_and_steps_before_it_must_be_those_of_then():
    saved = order([(2, 3)]).dump(12)
    order([(2, 3), (5, 5)]).check(saved, 12)
    for skip, asked in (((), "none"), ([(1, 3)], "1-3"), ([(2, 2)], "2-2")):
        with pytest.raises(UserError, match=f"it names {asked}, but 2-3 were skipped"):
            order(skip).check(saved, 12)


def test_a_checkpoint_inside_a_range_knows_the_part_that_was_passed():
    saved = order([(2, 3)]).dump(8)
    order([(2, 2), (9, 9)]).check(saved, 8)
    with pytest.raises(UserError, match="it names none, but 2-2"):
        order([(3, 3)]).check(saved, 8)
