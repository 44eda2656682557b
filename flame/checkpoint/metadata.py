"""What the .metadata of a DCP checkpoint says, read without torch. It is a pickle, and no code that it names is run."""

import io
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from flame.checkpoint.dtypes import CODES
from flame.errors import first_line

METADATA = ".metadata"
_DCP = "torch.distributed.checkpoint"


class _Sealed(type):
    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"{cls.__name__} cannot be changed by a checkpoint")


class _Record(metaclass=_Sealed):
    """Stands in for an object of the pickle, whose fields become attributes."""


class _Ignored(_Record):
    def __init__(self, *_: Any) -> None:
        pass


class _Properties(_Record):
    """Of a tensor; the pickle has a tuple of them that begins with the dtype."""

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0]


# Exact names: one with a dot, such as os.system, would be looked up inside its module.
_KNOWN: dict[tuple[str, str], Any] = {
    (f"{_DCP}.metadata", "Metadata"): _Record,
    (f"{_DCP}.metadata", "StorageMeta"): _Record,
    (f"{_DCP}.metadata", "MetadataIndex"): _Record,
    (f"{_DCP}.metadata", "TensorStorageMetadata"): _Record,
    (f"{_DCP}.metadata", "BytesStorageMetadata"): _Record,
    (f"{_DCP}.metadata", "ChunkStorageMetadata"): _Record,
    (f"{_DCP}.metadata", "TensorProperties"): _Properties,
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): _Ignored,
    (f"{_DCP}.filesystem", "_StorageInfo"): _Record,
    ("torch.serialization", "_get_layout"): _Ignored,
    ("torch", "Size"): tuple,
    ("pathlib", "PosixPath"): _Ignored,
    ("pathlib._local", "PosixPath"): _Ignored,  # of Python 3.13
}
_NO_SAFETENSORS = ("complex32", "complex64", "complex128", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
_DTYPES = (*CODES, *_NO_SAFETENSORS)
_KNOWN.update({("torch", dtype): dtype for dtype in _DTYPES})

Sizes = tuple[int, ...]


class Chunk(NamedTuple):
    """A box of a tensor that one rank saved."""

    offsets: Sizes
    sizes: Sizes


class TensorInfo(NamedTuple):
    """A tensor of a checkpoint; dtype is torch's name for it."""

    dtype: str
    shape: Sizes
    chunks: list[Chunk]


class Place(NamedTuple):
    """Where bytes of a checkpoint are: `length` of them in `file`, from `start` on."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Metadata:
    """The tensors by name, None for what is no tensor; the places by name and, of a tensor, offsets of the chunk."""

    tensors: Mapping[str, TensorInfo | None]
    places: Mapping[tuple[str, Sizes | None], Place]
    save_id: str

    def file_sizes(self) -> dict[str, int]:
        """{file: bytes in use}."""
        sizes: dict[str, int] = {}
        for place in self.places.values():
            sizes[place.file] = max(place.start + place.length, sizes.get(place.file, 0))
        return sizes


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint of tensors")
        return _KNOWN[module, name]


def parse_metadata(data: bytes) -> Metadata:
    """Raises ValueError for what is not the metadata of a DCP checkpoint, or names a file outside of its folder."""
    try:
        found = _Unpickler(io.BytesIO(data)).load()
        tensors = {_text(name): _tensor(info) for name, info in found.state_dict_metadata.items()}
        origin = getattr(found, "storage_meta", None)
        return Metadata(tensors, _places(found.storage_data), _text(origin.save_id or "") if origin else "")
    except Exception as error:  # a foreign or corrupted pickle may raise anything
        raise ValueError(first_line(error)) from None


def _tensor(info: Any) -> TensorInfo | None:
    if not vars(info):  # bytes, which are no tensor
        return None
    offsets, sizes = [chunk.offsets for chunk in info.chunks], [chunk.sizes for chunk in info.chunks]
    _check_sizes([info.size, *offsets, *sizes])
    if (dtype := info.properties.dtype) not in _DTYPES:
        raise ValueError(f"dtype {dtype!r}")
    return TensorInfo(dtype, info.size, list(map(Chunk, offsets, sizes)))


def _places(stored: Mapping[Any, Any]) -> dict[tuple[str, Sizes | None], Place]:
    indices = [(index.fqn, getattr(index, "offset", None)) for index in stored]
    places = [Place(place.relative_path, place.offset, place.length) for place in stored.values()]
    for place in stored.values():
        if transforms := getattr(place, "transform_descriptors", None):  # of DCP's extensions, which compress
            raise ValueError(f"stored by {transforms}, must be uncompressed")
    _check_sizes([offset for _, offset in indices if offset is not None] + [place[1:] for place in places])
    for name in {name for name, _ in indices}:
        _text(name)
    for file in {place.file for place in places}:
        if not is_plain(_text(file)):
            raise ValueError(f"{file!r} is not a file of the checkpoint")
    return dict(zip(indices, places, strict=True))


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"a {type(value).__name__} in place of a name")
    return value


def _check_sizes(values: list[Any]) -> None:
    """All at once, as a large checkpoint has millions of them."""
    kinds = set(map(type, values)) - {tuple} or set(map(type, chain.from_iterable(values))) - {int}
    if kinds or min(chain.from_iterable(values), default=0) < 0:
        raise ValueError(f"{kinds or 'numbers below 0'} in place of sizes")


def is_plain(file: str) -> bool:
    """Whether this is the name of a file in the checkpoint's own folder, and not a path that leads elsewhere."""
    return os.path.basename(file) == file and file not in ("", ".", "..") and "\0" not in file
