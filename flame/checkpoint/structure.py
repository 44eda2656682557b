"""The tensors that a config's model has, and a comparison with the tensors found in a checkpoint."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

from flame.checkpoint.dtypes import FLOATS, Box
from flame.errors import as_line

TensorSpec = tuple[str, tuple[int, ...]]  # (dtype, shape)
TensorSpecs = Mapping[str, TensorSpec]  # by name
SHOWN = 20  # mismatches in an error


class ConversionError(ValueError):
    """The result of a conversion is not, or would not be, the model it was made from."""


@dataclass(frozen=True)
class PublishedTensor:
    """What a published checkpoint has under one name: a tensor of the model, or a box of it, such as one expert's.

    The box begins at the coordinates `start`; leading dimensions that `shape` lacks have size 1. heads: if not 0, the
    rows are this many equal groups, and the two halves of a group are the tensor's even and odd rows.
    """

    tensor: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    heads: int = 0

    @property
    def box(self) -> Box:
        """(start, stop) in each dimension of the model's tensor."""
        sizes = (1,) * (len(self.start) - len(self.shape)) + tuple(self.shape)
        return tuple((low, low + size) for low, size in zip(self.start, sizes, strict=True))


def whole(name: str, shape: tuple[int, ...]) -> PublishedTensor:
    """A tensor that is published as a whole, under its own name."""
    return PublishedTensor(name, (0,) * len(shape), shape)


@dataclass(frozen=True)
class Structure:
    """A model's tensors, {name: (dtype, shape)} as built in float32.

    shared: further names of tied tensors, {name: tensor}, which a checkpoint may have or not. ignored: patterns of
    names in published checkpoints that transformers ignores. published_as: what a published checkpoint has, {name:
    PublishedTensor}; empty if that is the model's tensors by their own names. vocabulary: tensors with a row per id.
    prefix: of the backbone's names ("transformer" of GPT-2), which checkpoints of the backbone alone do without.
    """

    tensors: TensorSpecs
    shared: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    published_as: Mapping[str, PublishedTensor] = field(default_factory=dict)
    vocabulary: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def published(self) -> "Structure":
        """The structure of a published checkpoint of this model."""
        if not self.published_as:
            return self
        kept = {name: part for name, part in self.published_as.items() if part.tensor in self.tensors}
        tensors = {name: (self.tensors[part.tensor][0], part.shape) for name, part in kept.items()}
        rows = tuple(name for name, part in kept.items() if part.tensor in self.vocabulary)
        names = {part.tensor: name for name, part in kept.items()}
        shared = {name: names[self.shared[part.tensor]] for name, part in self.published_as.items() if name not in kept}
        return Structure(tensors, shared, self.ignored, vocabulary=rows, prefix=self.prefix)

    def full_name(self, name: str) -> str:
        """The name in the model of a tensor that a checkpoint may have without the backbone's prefix."""
        longer = f"{self.prefix}.{name}"
        return longer if name not in self.tensors and longer in self.tensors else name

    def published_tensor(self, name: str) -> PublishedTensor:
        """What a published checkpoint has under a name that is not in `shared`."""
        return self.published_as[name] if self.published_as else whole(name, self.tensors[name][1])

    def before_growth(self, found: TensorSpecs) -> "Structure":
        """The structure with no more ids than the found tensors have rows."""
        tensors = dict(self.tensors)
        for name in self.vocabulary:
            dtype, shape = tensors[name]
            _, rows = found.get(name, (dtype, shape))
            if len(rows) == len(shape) and rows[0] < shape[0]:
                tensors[name] = (dtype, (rows[0], *shape[1:]))
        return replace(self, tensors=tensors)

    def ignores(self, name: str) -> bool:
        """Whether transformers ignores a tensor of this name."""
        return name not in self.tensors and any(re.search(pattern, name) for pattern in self.ignored)


class NamedTensors(NamedTuple):
    """The tensors of a torch module by name."""

    specs: dict[str, TensorSpec]  # a tied tensor is listed once, under its first name
    tied: dict[str, str]  # {further name: first name}
    names: dict[int, str]  # {id of a tensor: its first name}


def name_tensors(model: Any) -> NamedTensors:
    """The parameters and persistent buffers of a torch module."""
    found = NamedTensors({}, {}, {})
    for name, tensor in model.state_dict(keep_vars=True).items():
        if found.names.setdefault(id(tensor), name) == name:
            found.specs[name] = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        else:
            found.tied[name] = found.names[id(tensor)]
    return found


def main_dtype(found: TensorSpecs) -> str:
    """The dtype of most floating-point elements, float32 if there are none."""
    counts: Counter[str] = Counter()
    for dtype, shape in found.values():
        if dtype in FLOATS:
            counts[dtype] += prod(shape)
    return max(counts, key=lambda dtype: counts[dtype], default="float32")


def check_structure(found: TensorSpecs, structure: Structure) -> None:
    """Raises ConversionError, with a line per mismatch, if the tensors found are not those of the structure."""
    if mismatches := find_mismatches(found, structure):
        more = [f"and {len(mismatches) - SHOWN} more"] if len(mismatches) > SHOWN else []
        raise ConversionError(
            "not the tensors of the config's model\n  " + "\n  ".join([*map(as_line, mismatches[:SHOWN]), *more])
        )


def find_mismatches(found: TensorSpecs, structure: Structure) -> list[str]:
    """A line for each tensor that is missing, is unexpected, or has the wrong shape or dtype.

    A floating-point tensor may have the model's own dtype, or the `main_dtype` that the model was cast to.
    """
    main = main_dtype(found)
    mismatches = [f"missing: {name}" for name in structure.tensors if name not in found]
    for name, (dtype, shape) in found.items():
        if name in structure.shared:
            continue
        if name not in structure.tensors:
            mismatches.append(f"unexpected: {name}")
            continue
        expected, expected_shape = structure.tensors[name]
        if tuple(shape) != tuple(expected_shape):
            mismatches.append(f"shape: {name} has {list(shape)}, the config says {list(expected_shape)}")
        allowed = {expected, main} if expected in FLOATS else {expected}
        if dtype not in allowed:
            mismatches.append(f"dtype: {name} has {dtype}, must have {' or '.join(sorted(allowed))}")
    return mismatches
