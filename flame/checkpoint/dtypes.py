"""The dtypes of checkpoint tensors, by torch's and safetensors' names, and boxes of tensors."""

import math
from collections.abc import Iterator

_ELEMENTS = {  # torch's name: safetensors' code, bytes
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
CODES = {name: code for name, (code, _) in _ELEMENTS.items()}
NAMES = {code: name for name, code in CODES.items()}
SIZES = {name: size for name, (_, size) in _ELEMENTS.items()}
FLOATS = ("float64", "float32", "float16", "bfloat16")  # the dtypes that can be cast
Box = tuple[tuple[int, int], ...]  # (start, stop) in each dimension


def slices(box: Box) -> tuple[slice, ...]:
    """The index of a box in a tensor."""
    return tuple(slice(start, stop) for start, stop in box)


def split_box(whole: Box, limit: int) -> Iterator[Box]:
    """Split a box into boxes of at most `limit` elements, in row-major order."""
    if math.prod(stop - start for start, stop in whole) <= limit:
        yield whole
        return
    (start, stop), inner = whole[0], whole[1:]
    row = math.prod(stop - start for start, stop in inner)
    if row > limit:
        for i in range(start, stop):
            for rest in split_box(inner, limit):
                yield ((i, i + 1), *rest)
        return
    for i in range(start, stop, limit // row):
        yield ((i, min(i + limit // row, stop)), *inner)
