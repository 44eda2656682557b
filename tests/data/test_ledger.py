import json

import numpy as np
import pytest
import torch

from flame.data.ledger import digest_batch, read_ledger, roll

RNG = np.random.default_rng(0)
INPUTS, LABELS = RNG.integers(0, 1000, (8, 16)), RNG.integers(-100, 1000, (8, 16))
WHOLE = digest_batch(INPUTS, LABELS, range(8))


def wrapped(total):
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_sum_over_ranks_is_the_same_in_every_layout(world):
    parts = [digest_batch(INPUTS[r::world], LABELS[r::world], range(r, 8, world)) for r in range(world)]
    assert wrapped(sum(parts)) == WHOLE
    assert torch.tensor(parts, dtype=torch.int64).sum().item() == WHOLE


def test_the_order_of_the_rows_and_their_type_do_not_matter():
    order = RNG.permutation(8)
    assert digest_batch(torch.from_numpy(INPUTS[order]), torch.from_numpy(LABELS[order]).int(), order) == WHOLE
    assert -(2**63) <= WHOLE < 2**63


def test_any_token_label_or_place_changes_it():
    other = INPUTS.copy()
    other[3, 7] += 1
    assert digest_batch(other, LABELS, range(8)) != WHOLE
    other = LABELS.copy()
    other[7, 0] += 1
    assert digest_batch(INPUTS, other, range(8)) != WHOLE
    assert digest_batch(INPUTS, LABELS, [1, 0, *range(2, 8)]) != WHOLE


def test_the_ledger_depends_on_every_step_and_their_order():
    one, two = roll(roll("", 1), -2), roll(roll("", -2), 1)
    assert one != two and len(one) == 16 and int(one, 16) >= 0
    assert roll(roll("", 1), -2) == one


DAMAGED = [
    *(
        b'{"step": 3, "tokens": 5, "data_dig',
        b"",
        b"\0" * 64,
        b"[]",
        b"3}",
        b"\xff}",
        b'{"a": }',
        b"[" * 100_000 + b"}",
    ),
    *(b'{"step": "3", "tokens": 5, "data_digest": "a"}', b'{"step": [], "tokens": 5, "data_digest": "a"}'),
    *(b'{"step": 3, "data_digest": "a"}', b'{"step": 3, "tokens": 5, "data_digest": 7}'),
]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_of_the_metrics_costs_that_line_only(line, tmp_path):
    record = {"step": 2, "tokens": 10, "data_digest": "0" * 16}
    whole = json.dumps(record).encode()
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([line, whole, line]))
    assert read_ledger(tmp_path) == {2: record}
