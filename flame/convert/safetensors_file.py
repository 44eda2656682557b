"""safetensors files, written and read a tensor at a time."""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash
from safetensors import SafetensorError, safe_open

from flame.checkpoint.commit import hash_file
from flame.checkpoint.dtypes import CODES, NAMES, SIZES, Box, slices
from flame.checkpoint.structure import ConversionError, TensorSpecs
from flame.config.files import check_regular, read_json
from flame.errors import UserError, first_line

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorEntry:
    """The tensor `name` of a safetensors file; dtype is torch's name for it."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    name: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]

    def read(self, box: Box | None = None) -> "torch.Tensor":
        """The tensor or a box of it, which may have leading dimensions of one element more than the file's tensor.

        Raises UserError if the file cannot be read.
        """
        with _open(self.file, "pt") as opened:
            if box is None or not self.shape:
                return opened.get_tensor(self.name).reshape(self.shape)
            tensor = opened.get_slice(self.name)
            inner = box[len(box) - len(tensor.get_shape()) :]
            return tensor[slices(inner)].reshape([stop - start for start, stop in box])


@contextmanager
def _open(file: Path, framework: str) -> Iterator[Any]:
    check_regular(str(file), file)
    try:
        with safe_open(file, framework) as opened:
            yield opened
    except OSError as error:
        raise UserError(str(file), hint=f"cannot be read ({error.strerror or error})") from None
    except (SafetensorError, KeyError) as error:
        raise UserError(str(file), first_line(error), "a whole safetensors file") from None


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of a file. Raises UserError if it is not a whole safetensors file."""
    with _open(file, "np") as opened:  # without torch
        tensors = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        return {
            name: TensorEntry(NAMES[tensor.get_dtype()], tuple(tensor.get_shape()), file, name)
            for name, tensor in tensors.items()
        }


def read_headers(files: Iterable[Path]) -> dict[str, TensorEntry]:
    """The tensors of several files. Raises UserError if one is not whole, or two have a tensor of the same name."""
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                reason = f"has {name}, as {entries[name].file} does; a tensor must be in one file alone"
                raise UserError(str(file), hint=reason)
            entries[name] = entry
    return entries


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder, as transformers finds them. Raises UserError if it has none."""
    weights, index = folder / "model.safetensors", folder / INDEX
    for path in (weights, index):
        if os.path.lexists(path) and not path.is_file():
            raise UserError(str(path), "a link to nothing, a folder or a device", "a regular file")
    if weights.is_file():  # an index beside it is stale
        return [weights]
    if index.is_file():
        try:
            files = sorted(set(map(Path, read_json(index)["weight_map"].values())))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(str(index), f"{type(error).__name__}: {error}", "an index of safetensors") from None
        if outside := [file for file in files if file.is_absolute() or ".." in file.parts]:
            raise UserError(str(index), str(outside[0]), "an index of files in its own folder")
        return [folder / file for file in files]
    found = sorted(path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    allowed = "a folder with model.safetensors or its index"
    raise UserError(str(folder), ", ".join(found[:5]) or "no weights", allowed, "save_pretrained writes them")


def write_file(file: Path, tensors: TensorSpecs, read: Callable[[str], "torch.Tensor"]) -> str:
    """Write a file of these tensors, {name: (dtype, shape)}, a tensor at a time; returns its sha256.

    The tensors of wide dtypes come first, which aligns all of them.
    """
    names = sorted(tensors, key=lambda name: -SIZES[tensors[name][0]])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape = tensors[name]
        start, end = end, end + math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(file, "xb") as stream:
        stream.write(start_of_file := struct.pack("<Q", len(text)) + text)
        digest.update(start_of_file)
        for name in names:
            stream.write(data := as_bytes(read(name)))
            digest.update(data)
        assert stream.tell() == 8 + len(text) + end
    return digest.hexdigest()


def check_file(file: Path, digest: str) -> None:
    """Read back a file that `write_file` wrote. Raises ConversionError if its sha256 is another."""
    if hash_file(file, hashlib.sha256) != digest:
        raise ConversionError(f"{file} reads back as other bytes than were written")


def as_bytes(tensor: "torch.Tensor") -> memoryview:
    """The bytes of a tensor."""
    import torch  # here: preflight reads headers without it

    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def hash_tensor(tensor: "torch.Tensor") -> str:
    """The xxh3_128 of a tensor's bytes, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(as_bytes(tensor))


def group_by_bytes(items: Iterable[T], nbytes: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Items for one file each, of at most `limit` bytes unless a single one has more."""
    group: list[T] = []
    size = 0
    for item in items:
        if group and size + nbytes(item) > limit:
            yield group
            group, size = [], 0
        group.append(item)
        size += nbytes(item)
    yield group
