import numpy as np
import pytest
import torch

from flame.checkpoint.dtypes import CODES, SIZES, slices, split_box


def test_sizes_are_torchs():
    assert all(getattr(torch, name).itemsize == SIZES[name] for name in CODES)


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 4), (1, 1, 9), (0, 4), (4, 0)])
@pytest.mark.parametrize("limit", [1, 2, 5, 12, 100])
def test_a_box_is_split_in_order_and_completely(shape, limit):
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    box = tuple((n // 3, n) for n in shape)
    parts = [whole[slices(part)] for part in split_box(box, limit)]
    wanted = whole[slices(box)]
    assert np.array_equal(np.concatenate([part.reshape(-1) for part in parts]), wanted.reshape(-1))
    assert all(part.size <= limit for part in parts)
