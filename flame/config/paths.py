"""Tells paths on this machine from hub ids. Imports neither torch nor numpy."""

import os
import shlex
from glob import iglob
from pathlib import Path

from flame.errors import UserError

CHECKOUT = Path(__file__).parents[2]
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow", ".txt": "text"}  # of `datasets`
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
PATTERN = frozenset("*?[")  # characters of a glob pattern
BUILDERS = ("json", "parquet", "text", "csv", "arrow")  # of load_dataset: the data is in data_files
_ENDINGS = (
    *(*KINDS, *COMPRESSED, ".toml", ".bin", ".idx", ".csv", ".tsv", ".ndjson", ".md", ".html", ".xml", ".yaml", ".yml"),
    *(".py", ".log", ".pdf", ".zip", ".tar", ".tgz", ".model", ".safetensors", ".pt", ".pth", ".pkl", ".npy", ".h5"),
)


def command(script: str, *words: str | Path) -> str:
    """A command line with a script of this checkout that can be pasted in any folder; a Path is made absolute."""
    plain = [os.path.abspath(word) if isinstance(word, Path) else word for word in (CHECKOUT / script, *words)]
    return shlex.join(["bash", *plain])


def ending(file: str) -> str:
    """The last suffix of a file that is not a compressed file's, in lower case: .jsonl of a.jsonl.gz and A.JSONL."""
    return next((suffix for suffix in reversed(Path(file.lower()).suffixes) if suffix not in COMPRESSED), "")


def exists(path: str) -> bool:
    """Whether a path or glob pattern, ~ expanded, names anything on this machine."""
    # os.path, as pathlib raises where a name is too long or a folder may not be read
    path = os.path.expanduser(path)
    return os.path.exists(path) or any(iglob(path, recursive=True))  # the first alone: ** follows loops of links


def is_local(name: str) -> bool:
    """Whether a name means a path on this machine, be it there or not, rather than a hub id or a URL."""
    if "://" in name:
        return False
    deep = name.startswith(("/", ".", "~")) or name.count("/") > 1  # a hub id is NAME or OWNER/NAME
    return deep or bool(PATTERN & set(name)) or name.lower().endswith(_ENDINGS) or exists(name)


def check_path(setting: str, name: str) -> None:
    """Raise UserError if a name means a path on this machine and nothing is there."""
    if is_local(name) and not exists(name):
        raise UserError(setting, f"no file or folder {name}")
