"""Hugging Face weights that a run starts from: where they are, and whether they are those of its model."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from flame.checkpoint.structure import Structure, TensorSpecs, find_mismatches
from flame.convert.safetensors_file import Entry, find_files, read_bytes, read_headers
from flame.errors import UserError

FLAG = "--checkpoint.initial_load_path"
SHOWN = 3  # complaints that fit into one line
_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")  # no pickles, no second copies


@dataclass(frozen=True)
class Weights:
    """The tensors of safetensors files in a folder, by the names they are published under, and the model they fit."""

    folder: Path
    entries: Mapping[str, Entry]
    structure: Structure


def check_source(source: str, may_download: bool = True) -> None:
    """Refuse a folder that is missing or holds no whole safetensors files; what the hub has is not asked. UserError."""
    if os.path.isdir(source):
        read_headers(find_files(Path(source), FLAG), FLAG)
    elif not may_download or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise UserError(f"{FLAG}: there is no folder {source}")


def find_folder(source: str) -> Path:
    """A local folder, or where huggingface_hub keeps the safetensors of a hub id, downloaded if need be. UserError."""
    if os.path.isdir(source):
        return Path(source)
    from huggingface_hub import snapshot_download  # here: what reads weights need not know the hub

    try:
        return Path(snapshot_download(source, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:  # all that huggingface_hub raises is one of these
        said = str(error).strip().splitlines() or [""]
        raise UserError(f"{FLAG} {source}: no folder here, nor to be had from the hub ({said[0]})") from None


def read_weights(folder: Path, structure: Structure, *, grow: bool = False) -> Weights:
    """The weights in a folder, by the headers of its files; of tied tensors that are there twice, by all of them.

    With `grow` they may have fewer ids than the model. Raises UserError, in one line, for whatever tensor is missing,
    unexpected, or of another shape or type than the model's.
    """
    published = structure.published
    entries = read_headers(find_files(folder, FLAG), FLAG)
    entries = {name: entry for name, entry in entries.items() if not published.ignores(name)}
    entries = under_own_names(entries, published)
    for complaint in untied(entries.keys(), published, lambda name: checksum(entries[name])):
        raise UserError(f"{FLAG} {folder}: {complaint}")
    found = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    smaller = published.before_growth(found)
    may_grow = not grow and not find_mismatches(found, smaller)
    hint = "; --model.grow_vocab or --model.add_tokens starts from fewer ids" if may_grow else ""
    check_found(f"{FLAG} {folder}", found, smaller if grow else published, hint)
    return Weights(folder, {name: e for name, e in entries.items() if name in published.tensors}, structure)


def under_own_names(entries: Mapping[str, Entry], published: Structure) -> dict[str, Entry]:
    """The tensors of files, of which a tied one may be there under its further name alone."""
    further = {tensor: name for name, tensor in published.shared.items() if name in entries and tensor not in entries}
    renamed = {name: tensor for tensor, name in further.items()}  # one of them; `untied` compares the others with it
    return {renamed.get(name, name): entry for name, entry in entries.items()}


def untied(names: Collection[str], structure: Structure, checksum: Callable[[str], str]) -> Iterator[str]:
    """What is wrong where a further name of a tied tensor has other values: transformers would not tie it."""
    for name in sorted(structure.shared.keys() & names):
        tensor = structure.shared[name]
        if tensor in names and checksum(name) != checksum(tensor):
            yield f"{name} is not {tensor}, which the config ties it to; set tie_word_embeddings to false"


def checksum(entry: Entry) -> str:
    """A hash of a tensor in a file."""
    digest = xxhash.xxh3_128(f"{entry.dtype} {entry.shape}".encode())
    for piece in read_bytes(entry):
        digest.update(piece)
    return digest.hexdigest()


def check_found(where: str, found: TensorSpecs, structure: Structure, hint: str = "") -> None:
    """Raises UserError, in one line with a hint, for tensors that are not those of the structure."""
    if complaints := find_mismatches(found, structure):
        more = f" and {len(complaints) - SHOWN} more" if len(complaints) > SHOWN else ""
        said = "; ".join(complaints[:SHOWN])
        raise UserError(f"{where}: not the tensors of --model.config's model: {said}{more}{hint}")
