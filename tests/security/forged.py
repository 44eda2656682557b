"""Checkpoints whose pickles name code, which makes a folder wherever it runs; their markers are signed anew."""

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo

from flame.checkpoint.commit import MARKER, SavedFile, hash_file, write_marker
from flame.checkpoint.metadata import METADATA

# Modules that are loaded with a checkpoint, in which a name with dots is looked up.
MODULES = ("torch", "torch.serialization", "torch.distributed.checkpoint.metadata", "pathlib")


class Made:
    """A pickle of it calls os.mkdir."""

    def __init__(self, ran: Path) -> None:
        self.ran = str(ran)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.ran,)


def _text(word: str) -> bytes:
    return pickle.BINUNICODE + len(word.encode()).to_bytes(4, "little") + word.encode()


def _call(module: str, name: str, argument: bytes) -> bytes:
    return _text(module) + _text(name) + pickle.STACK_GLOBAL + argument + pickle.TUPLE1 + pickle.REDUCE


def codes(ran: Path) -> dict[str, bytes]:
    """Opcodes that leave one object on the stack, by how they name the code that makes the folder `ran`."""
    inner = io.BytesIO()
    torch.save(Made(ran), inner)
    command = _text(f"mkdir {ran}")
    loaded = pickle.BINBYTES + len(inner.getvalue()).to_bytes(4, "little") + inner.getvalue()
    setting = pickle.NONE + pickle.EMPTY_DICT + _text("fqn") + pickle.NEWTRUE + pickle.SETITEM + pickle.TUPLE2
    index = _text("torch.distributed.checkpoint.metadata") + _text("MetadataIndex") + pickle.STACK_GLOBAL
    return {
        "os.mkdir": _call("posix", "mkdir", _text(str(ran))),
        **{f"os.system in {module}": _call(module, "os.system", command) for module in MODULES},
        "_load_from_bytes": _call("torch.storage", "_load_from_bytes", loaded),
        "eval": _call("builtins", "eval", _text(f"__import__('os').mkdir({str(ran)!r})")),
        "the oldest protocol": b"cposix\nsystem\n" + command + pickle.TUPLE1 + pickle.REDUCE,
        "an instance": pickle.MARK + command + b"iposix\nsystem\n",
        "a class of torch that is changed": index + setting + pickle.BUILD,
    }


def forge_metadata(checkpoint: Path, code: bytes) -> None:
    """Have the .metadata, which stays whole, begin with other opcodes."""
    path = checkpoint / METADATA
    protocol, rest = path.read_bytes()[:2], path.read_bytes()[2:]
    path.write_bytes(protocol + code + pickle.POP + rest)
    sign(checkpoint)


def forge_value(checkpoint: Path, name: str, ran: Path, zipped: bool = True) -> None:
    """Have a value that is not a tensor, such as train_state.step, be a pickle that makes the folder `ran`."""
    file = checkpoint / "__9_0.distcp"
    torch.save(Made(ran), file, _use_new_zipfile_serialization=zipped)
    metadata = FileSystemReader(checkpoint).read_metadata()
    (index,) = [index for index in metadata.storage_data if index.fqn == name]
    metadata.storage_data[index] = _StorageInfo(file.name, 0, file.stat().st_size)
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))
    sign(checkpoint)


def sign(checkpoint: Path) -> None:
    """Write a marker with the sizes and hashes that the files have now."""
    path = checkpoint / MARKER
    known = json.loads(path.read_text()) if path.exists() else {"resumable": True}
    facts = {name: value for name, value in known.items() if name not in ("files", "versions", "xxh3_128")}
    files = [path for path in sorted(checkpoint.iterdir()) if path.name != MARKER]
    write_marker(checkpoint, [SavedFile(path.name, path.stat().st_size, hash_file(path)) for path in files], facts)
