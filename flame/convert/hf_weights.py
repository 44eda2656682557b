"""Hugging Face weights: where they are, which tensor of the model each is, and whether they are that model's."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flame.checkpoint.structure import PublishedTensor, Structure, TensorSpecs, find_mismatches
from flame.config.paths import is_local
from flame.convert.safetensors_file import TensorEntry, find_files, hash_tensor, read_headers
from flame.errors import UserError

if TYPE_CHECKING:
    from flame.convert.dcp_file import StoredTensor

Tensors = Mapping[str, "TensorEntry | StoredTensor"]  # of files, by name
FLAG = "--checkpoint.initial_load_path"
SHOWN = 3  # mismatches that fit into one line
_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")  # no pickles, no second copies


@dataclass(frozen=True)
class Weights:
    """Tensors of safetensors files, by the names they are published under, for a model of this structure."""

    entries: Mapping[str, TensorEntry]
    structure: Structure

    def placed(self) -> Iterator[tuple[TensorEntry, PublishedTensor]]:
        """Each tensor and where in the model it belongs; a tied one that is there twice comes once."""
        published = self.structure.published.tensors
        for name, entry in self.entries.items():
            if name in published:
                yield entry, self.structure.published_tensor(name)


def check_folder(source: str, may_download: bool = True) -> None:
    """Raises UserError for a folder that is missing or holds no whole safetensors files. Does not ask the hub."""
    if os.path.isdir(source):
        read_headers(find_files(Path(source)))
    elif not may_download or is_local(source):
        raise UserError(FLAG, f"no folder {source}")


def find_folder(source: str) -> Path:
    """A local folder, or where huggingface_hub keeps the safetensors of a hub id, downloaded if need be.

    Raises UserError if the hub does not have them.
    """
    if os.path.isdir(source):
        return Path(source)
    from huggingface_hub import snapshot_download  # here: what reads weights need not know the hub

    from flame.config.hub import check_available

    check_available(FLAG, source, "model")
    try:
        return Path(snapshot_download(source, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:  # all that huggingface_hub raises is one of these
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(FLAG, source, "a folder, or the id of a model on the hub", reason) from None


def read_weights(files: Iterable[Path], structure: Structure | None = None) -> Weights:
    """The tensors of safetensors files for a model of this structure, without those that transformers ignores.

    Names without the prefix of the backbone get it, and a tied tensor that is there under a further name alone gets its
    first name, as transformers does. Without a structure the model is taken
    to have the tensors of the files. Raises UserError if a file cannot be read.
    """
    entries = read_headers(files)
    if structure is None:
        return Weights(entries, Structure({name: (entry.dtype, entry.shape) for name, entry in entries.items()}))
    published = structure.published
    if not any(name.startswith(f"{published.prefix}.") for name in entries):
        entries = {published.full_name(name): entry for name, entry in entries.items()}
    entries = {name: entry for name, entry in entries.items() if not published.ignores(name)}
    alone = {first: name for name, first in published.shared.items() if name in entries and first not in entries}
    first_names = {name: first for first, name in alone.items()}
    return Weights({first_names.get(name, name): entry for name, entry in entries.items()}, structure)


def specs_of(tensors: Tensors) -> TensorSpecs:
    """{name: (dtype, shape)} of the tensors of files."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def find_untied(tensors: Tensors, structure: Structure) -> str | None:
    """What is wrong if a further name of a tied tensor has other values: transformers would not tie it."""
    for name in sorted(structure.shared.keys() & tensors.keys()):
        first = structure.shared[name]
        if first in tensors and _content(tensors[name]) != _content(tensors[first]):
            return f"{name} is not {first}, which the config ties it to; set tie_word_embeddings to false"
    return None


def _content(tensor: "TensorEntry | StoredTensor") -> tuple[str, tuple[int, ...], str]:
    return tensor.dtype, tensor.shape, hash_tensor(tensor.read())


def check_tensors(
    setting: str, path: Path, tensors: Tensors, structure: Structure, hint: str = "", *, ties: bool = True
) -> None:
    """Raises UserError if the tensors of `path` are not the structure's or, with `ties`, tied ones are not equal."""
    if mismatches := find_mismatches(specs_of(tensors), structure):
        of_each_kind = {mismatch.partition(":")[0]: mismatch for mismatch in reversed(mismatches)}
        shown = list(dict.fromkeys([*reversed(of_each_kind.values()), *mismatches]))[:SHOWN]
        more = f" and {len(mismatches) - SHOWN} more" if len(mismatches) > SHOWN else ""
        reason = "; ".join(shown) + more + (f"; {hint}" if hint else "")
        raise UserError(setting, path, "weights of --model.config's model", reason)
    if ties and (problem := find_untied(tensors, structure)):
        raise UserError(setting, path, hint=problem)


def check_weights(weights: Weights, folder: Path, *, grow: bool = False) -> None:
    """Raises UserError if the weights of a folder are not the model's; with `grow` they may have fewer ids than it."""
    published = weights.structure.published
    smaller = published.before_growth(specs_of(weights.entries))
    mismatches = find_mismatches(specs_of(weights.entries), smaller)
    hint = "" if mismatches else "--model.grow_vocab or --model.add_tokens starts from fewer ids"
    check_tensors(FLAG, folder, weights.entries, smaller if grow else published, hint)
