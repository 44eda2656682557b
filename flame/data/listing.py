"""The local files that a source names, by kind. Imports neither torch nor numpy: preflight calls it."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from flame.config.paths import BUILDERS, KINDS, ending, exists
from flame.config.schema import DataSource
from flame.errors import UserError, first_line

NO_ROWS = ("README.md", "config.json", "dataset_info.json", "dataset_infos.json")  # as `datasets` has it
_SAVED = ("state.json", "dataset_info.json")  # of a folder that save_to_disk wrote


@dataclass(frozen=True)
class Listing:
    """The files to read, {kind: paths in their order}, a .idx for each Megatron pair; and those that are left out."""

    files: dict[str, list[str]]
    left_out: Sequence[str] = ()


def check_fields(source: DataSource) -> None:
    """Raises UserError, whose setting is a field of a source, if it means nothing to what the path names."""
    fields = {"subset": source.subset, "data_dir": source.data_dir, "data_files": source.data_files}
    root = Path(source.path).expanduser()
    if source.path == "stdlib":
        what, fields["split"] = "Python's own source code", source.split
    elif "://" in source.path and not source.path.startswith("hf://"):
        hint = f"files elsewhere are data_files, of one of the paths {', '.join(BUILDERS)}"
        raise UserError("path", source.path, "a local path or a hub id", hint)
    elif is_saved(root):
        what = "a folder that save_to_disk wrote"
    elif source.path not in BUILDERS and not root.is_dir() and (exists(source.path) or is_pair(source.path)):
        what = "a file"
    else:
        return
    for field, value in fields.items():
        if value:
            raise UserError(field, value, "none", f"{source.path} is {what}")


def list_files(source: DataSource, split: str | None) -> Listing | None:
    """The local files of a split of a source; None for a hub id, other URLs and a folder that save_to_disk wrote.

    split: None or "all" means all files, unless a dataset card names splits. Raises UserError, whose setting is a field
    of the source, if there are none; and OSError for a folder that cannot be read.
    """
    root = Path(source.path).expanduser()
    patterns = [file.strip() for file in source.data_files.split(",")] if source.data_files else []
    if is_saved(root) or any("://" in pattern for pattern in patterns):
        return None
    is_folder = root.is_dir()
    is_builder = not is_folder and source.path in KINDS.values() and bool(patterns)  # of `datasets`
    folder = root / (source.data_dir or "") if is_folder else Path(source.data_dir or "")
    if patterns and (is_folder or is_builder):
        found = [file for pattern in patterns for file in expand(pattern, folder)]
        found = list({os.path.normpath(file): file for file in found}.values())  # once, though two patterns match it
    else:
        found = _walk(str(folder)) if is_folder else expand(source.path)
    if not found and not is_folder and not is_builder:
        return None
    splits = {"train": found}
    if is_folder and not patterns:
        if source.subset or (not source.data_dir and _names_splits(root / "README.md")):
            splits, split = _read_card(root, source.subset, found), split or "train"
        else:
            splits = _split_by_names(found, folder)
    if split not in (None, "all", *splits):
        raise UserError("split", split, f"one of {', '.join(splits)}, the splits of {source.path}")
    # Names alone make no splits unless the user asks for one; but where all are of one, they keep its order.
    chosen = splits.get(split or "train", [])
    if split in (None, "all") and len(chosen) < len(found):
        chosen = found
    files: dict[str, list[str]] = {}
    for file in chosen:
        if kind := source.path if is_builder else _kind(file):
            files.setdefault(kind, []).append(file)
            if not os.path.isfile(file):
                raise UserError("path", file, "a file", "it is a link to nothing, or a device")
    if not files:
        nothing = f"no files to read in folder {source.path}" if is_folder else source.path
        raise UserError("path", nothing, f"files that end in {', '.join(KINDS)}, or .bin beside .idx")
    read = {file for kind in files.values() for file in kind}
    return Listing(files, [file for file in found if file not in read])


def expand(pattern: str, folder: str | Path = "") -> list[str]:
    """The files of a path, pattern or Megatron prefix, in a folder or else here; of a folder, all files under it."""
    pattern = os.path.expanduser(pattern)
    for root in (str(folder), ""):
        path = os.path.join(root, pattern)
        if os.path.lexists(path):
            matches = [path]
        elif is_pair(path):
            matches = [path + ".idx"]
        else:
            matches = sorted(_match(pattern, root))
        if matches:
            files = [file for match in matches for file in (_walk(match) if os.path.isdir(match) else [match])]
            return list(dict.fromkeys(map(_index_of_pair, files)))
    return []


def _match(pattern: str, root: str) -> list[str]:
    """The paths in a folder that match a pattern; `**` means the folders of `_walk`, as glob would follow loops."""
    from fsspec.utils import glob_translate

    parts = Path(pattern).parts
    above = parts.index("**") if "**" in parts else len(parts)
    bases = [root or "."]
    if above:
        bases = [os.path.join(root, name) for name in sorted(glob(str(Path(*parts[:above])), root_dir=root or None))]
    if above == len(parts):
        return [base for base in bases if not (os.path.basename(base).startswith("__") and os.path.isdir(base))]
    below = re.compile(glob_translate("/".join(parts[above:])))
    files = [(base, file) for base in bases for file in _walk(base)]
    return [os.path.normpath(file) for base, file in files if below.match(os.path.relpath(file, base))]


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote a folder."""
    return (folder / "dataset_dict.json").exists() or all((folder / name).exists() for name in _SAVED)


def is_pair(prefix: str) -> bool:
    """Whether a prefix names a Megatron pair."""
    prefix = os.path.expanduser(prefix)
    return os.path.isfile(prefix + ".idx") and os.path.isfile(prefix + ".bin")


def _walk(folder: str) -> list[str]:
    """All files under a folder, those of links to folders too, in the order of their paths, none that is hidden."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for base, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        paths = [(name, os.path.join(base, name)) for name in folders if not name.startswith((".", "__"))]
        folders[:] = [name for name, path in paths if not (os.path.islink(path) and _is_loop(path))]
        no_rows = (*NO_ROWS, *_SAVED) if set(_SAVED) <= set(names) else NO_ROWS
        found += [os.path.join(base, name) for name in names if not name.startswith(".") and name not in no_rows]
    return list(dict.fromkeys(map(_index_of_pair, sorted(found))))


def _is_loop(path: str) -> bool:
    """Whether a path goes through one folder twice."""
    absolute = Path(os.path.abspath(path))
    folders = [os.path.realpath(folder) for folder in (absolute, *absolute.parents)]
    return len(set(folders)) < len(folders)


def _index_of_pair(file: str) -> str:
    """The .idx of a Megatron pair for either of its files; any other file itself."""
    return file[:-4] + ".idx" if file.endswith(".bin") and is_pair(file[:-4]) else file


def _kind(file: str) -> str | None:
    if file.endswith(".idx"):
        return "megatron" if is_pair(file[:-4]) else None
    return KINDS.get(ending(file))


def _names_splits(card: Path) -> bool:
    """Whether a dataset card configures which files its splits have."""
    head = card.read_text("utf-8-sig", "replace").split("\n---")[0] if card.is_file() else ""
    return head.startswith("---") and re.search("^configs:", head, re.MULTILINE) is not None


def _read_card(folder: Path, subset: str | None, found: Sequence[str]) -> dict[str, list[str]]:
    """The files of each split that a dataset card names. Raises OSError or ValueError as `datasets` does."""
    from datasets import load_dataset_builder
    from yaml import YAMLError

    names = {os.path.abspath(file): file for file in found}
    try:
        files = load_dataset_builder(str(folder), subset).config.data_files or {}
    except (YAMLError, TypeError, AttributeError, KeyError) as error:  # of a header that anybody wrote
        raise UserError(str(folder / "README.md"), hint=f"its configs are damaged: {first_line(error)}") from error
    return {str(split): [names.get(os.path.abspath(file), file) for file in files[split]] for split in files}


def _split_by_names(found: Sequence[str], folder: Path) -> dict[str, list[str]]:
    """The files of each split that `datasets` sees in the names of files and folders; all are train if it sees none."""
    from datasets.data_files import _get_data_files_patterns
    from fsspec.utils import glob_translate

    names = {os.path.relpath(file, folder): file for file in found}

    def resolve(pattern: str) -> list[str]:
        return list(filter(re.compile(glob_translate(pattern)).match, names))

    patterns = _get_data_files_patterns(resolve) if names else {}
    matches = {split: dict.fromkeys(name for p in patterns[split] for name in resolve(p)) for split in patterns}
    return {str(split): [names[name] for name in matches[split]] for split in matches}
