"""The elements of checkpoint tensors: torch's and safetensors' names of their dtypes, their bytes, and casts."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from flame.checkpoint.commit import report_unreadable
from flame.errors import UserError

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
READ_BYTES = 4 << 20  # of a tensor that are read at a time
FLOATS = ("float64", "float32", "float16", "bfloat16")  # the dtypes that can be cast
Box = tuple[tuple[int, int], ...]  # (start, stop) in each dimension


def raw_dtype(dtype: str) -> np.dtype:
    """The unsigned integer of the same size, for elements that are moved and not computed with."""
    return np.dtype(f"u{SIZES[dtype]}")


def as_bytes(block: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, as a view."""
    return block.reshape(-1).view(np.uint8).data


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


def is_contiguous(box: Sequence[tuple[int, int]], sizes: tuple[int, ...]) -> bool:
    """Whether a box is contiguous in a row-major tensor: after its first range of several, all ranges are full."""
    extents = [stop - start for start, stop in box]
    first = next((i for i, extent in enumerate(extents) if extent > 1), len(extents))
    return all(extent == size for extent, size in zip(extents[first + 1 :], sizes[first + 1 :], strict=True))


def read_box(file: Path, start: int, dtype: str, sizes: tuple[int, ...], box: Sequence[tuple[int, int]]) -> np.ndarray:
    """The raw elements of a box of a row-major tensor whose bytes begin at `start` of a file.

    Raises EOFError if the file ends before them, and UserError if it cannot be read.
    """
    with report_unreadable(file):
        if not is_contiguous(box, sizes):  # such as columns: reads the pages they lie in
            return np.array(np.memmap(file, raw_dtype(dtype), "r", start, sizes)[tuple(slice(*each) for each in box)])
        first = 0  # offset in elements
        for (low, _), size in zip(box, sizes, strict=True):
            first = first * size + low
        block = np.empty([stop - low for low, stop in box], raw_dtype(dtype))
        view, done = as_bytes(block), 0
        with open(file, "rb", buffering=0) as stream:
            stream.seek(start + first * block.itemsize)
            while done < len(view):
                if not (count := stream.readinto(view[done:])):
                    raise EOFError
                done += count
        return block


def cast(block: np.ndarray, source: str, target: str) -> np.ndarray:
    """Cast raw elements from one floating dtype to another, rounding to nearest even as torch does.

    Raises UserError if either dtype is not in FLOATS.
    """
    if source == target:
        return block
    if source not in FLOATS or target not in FLOATS:
        raise UserError("--dtype", target, hint=f"{source} tensors cannot be cast, only {', '.join(FLOATS)}")
    values = (block.astype(np.uint32) << 16).view(np.float32) if source == "bfloat16" else block.view(source)
    with np.errstate(over="ignore", invalid="ignore"):  # a large value becomes infinite, as in torch
        if target == "float64":
            return values.astype(np.float64).view(np.uint64)
        single = values.astype(np.float32, copy=False)  # torch casts 64 to 16 bits through 32
        if target == "float16":
            return single.astype(np.float16).view(np.uint16)
    bits = single.view(np.uint32)
    if target == "float32":
        return bits
    rounded = bits >> 16  # to nearest even, in place
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    if np.isnan(single.max(initial=0)):  # rounding may carry a NaN's payload into its sign
        rounded[np.isnan(single)] = 0x7FC0
    return rounded.astype(np.uint16)
