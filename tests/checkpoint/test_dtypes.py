import numpy as np
import pytest
import torch

from flame.checkpoint.dtypes import CODES, FLOATS, SIZES, as_bytes, cast, raw_dtype, split_box
from flame.errors import UserError

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def floats(dtype):
    """All numbers of a 16-bit type, or many bit patterns of a wider one: subnormal, infinite, not a number."""
    if SIZES[dtype] == 2:
        return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 63), (1 << 63) - 1, (50_000,), generator=generator)
    edges = torch.tensor([0.0, -0.0, 1e-45, 65519.0, 65520.0, 3.39e38, float("inf"), float("nan"), 1.00390625])
    wide = bits.view(getattr(torch, dtype))
    return torch.cat([wide, edges.to(wide.dtype), torch.randn(1000, generator=generator).to(wide.dtype)])


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_a_cast_equals_torchs_bit_for_bit(source, target):
    given = floats(source)
    wanted = given.to(getattr(torch, target))
    bits = given.view(BITS[given.itemsize]).numpy().view(raw_dtype(source))
    found = torch.from_numpy(cast(bits, source, target).view(f"i{SIZES[target]}")).view(wanted.dtype)
    number = ~wanted.isnan()
    assert torch.equal(found.isnan(), ~number)
    assert torch.equal(found[number].view(BITS[found.itemsize]), wanted[number].view(BITS[found.itemsize]))


def test_only_floats_of_16_bits_or_more_are_cast():
    with pytest.raises(UserError, match="--dtype: found bfloat16; float8_e4m3fn tensors cannot be cast"):
        cast(np.zeros(3, np.uint8), "float8_e4m3fn", "bfloat16")


def test_sizes_are_torchs():
    assert all(getattr(torch, name).itemsize == SIZES[name] == raw_dtype(name).itemsize for name in CODES)


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 4), (1, 1, 9), (0, 4), (4, 0)])
@pytest.mark.parametrize("limit", [1, 2, 5, 12, 100])
def test_a_box_is_split_in_order_and_completely(shape, limit):
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    box = tuple((n // 3, n) for n in shape)
    parts = [whole[tuple(slice(*each) for each in part)] for part in split_box(box, limit)]
    wanted = whole[tuple(slice(*each) for each in box)]
    assert np.array_equal(np.concatenate([part.reshape(-1) for part in parts]), wanted.reshape(-1))
    assert all(part.size <= limit for part in parts)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 2)])
def test_arrays_of_any_shape_are_viewed_as_bytes(shape):
    assert bytes(as_bytes(np.ones(shape, np.uint32))) == np.ones(shape, np.uint32).tobytes()
