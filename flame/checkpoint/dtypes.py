"""The elements of checkpoints: torch's names for their types, safetensors' codes, their bytes, and casts."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

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
READ_BYTES = 4 << 20  # of a tensor, at a time
FLOATS = ("float64", "float32", "float16", "bfloat16")  # what can be cast
Box = tuple[tuple[int, int], ...]  # (start, stop) in each dimension


def raw_dtype(dtype: str) -> np.dtype:
    """The unsigned integer of the same bytes, by which elements are moved without a look at their values."""
    return np.dtype(f"u{SIZES[dtype]}")


def as_bytes(block: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, not copied."""
    return block.reshape(-1).view(np.uint8).data


def split_box(whole: Box, limit: int) -> Iterator[Box]:
    """Cut a box into boxes of at most `limit` elements that follow each other in row-major order."""
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
    """Whether the elements of a box follow each other in memory: below its first true range all is taken."""
    extents = [stop - start for start, stop in box]
    first = next((i for i, extent in enumerate(extents) if extent > 1), len(extents))
    return all(extent == size for extent, size in zip(extents[first + 1 :], sizes[first + 1 :], strict=True))


@contextmanager
def report_unreadable(file: Path) -> Iterator[None]:
    """A block that reads a file which is there; raises UserError if that cannot be done, as its bytes may be fine."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}), and may be whole: try again") from None


def read_box(file: Path, start: int, dtype: str, sizes: tuple[int, ...], box: Sequence[tuple[int, int]]) -> np.ndarray:
    """The raw elements of a box of a row-major tensor whose bytes begin at `start` of a file.

    Raises EOFError, and UserError if the file cannot be read.
    """
    with report_unreadable(file):
        if not is_contiguous(box, sizes):  # such as columns: the pages they lie in, for as long as it takes
            return np.array(np.memmap(file, raw_dtype(dtype), "r", start, sizes)[tuple(slice(*each) for each in box)])
        first = 0  # element of the tensor
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
    """Raw elements of one floating type as raw elements of another, rounded as torch rounds them: to nearest even.

    Raises UserError if either is not a float of 16 bits or more.
    """
    if source == target:
        return block
    if source not in FLOATS or target not in FLOATS:
        raise UserError(f"--dtype {target}: {source} tensors cannot be cast; found among {', '.join(FLOATS)}")
    values = (block.astype(np.uint32) << 16).view(np.float32) if source == "bfloat16" else block.view(source)
    with np.errstate(over="ignore", invalid="ignore"):  # a large value becomes infinite without a word, as in torch
        if target == "float64":
            return values.astype(np.float64).view(np.uint64)
        single = values.astype(np.float32, copy=False)  # torch goes from 64 to 16 bits by way of 32
        if target == "float16":
            return single.astype(np.float16).view(np.uint16)
    bits = single.view(np.uint32)
    if target == "float32":
        return bits
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    if np.isnan(single.max(initial=0)):  # rounding can carry a NaN's payload into its sign
        rounded[np.isnan(single)] = 0x7FC0
    return rounded.astype(np.uint16)
