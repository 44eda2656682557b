"""A folder that `AutoModelForCausalLM.from_pretrained` loads, made from a checkpoint and what the run recorded."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

from flame.checkpoint.structure import STRUCTURE, PublishedTensor, main_dtype
from flame.convert.conversion import convert_dcp_to_hf
from flame.convert.dcp_file import read_tensors
from flame.convert.report import new_folder, read_report, sha256, write_report
from flame.convert.safetensors_file import find_files, read_headers
from flame.errors import UserError


def export_checkpoint(
    checkpoint: Path,
    assets: Path | Callable[[], Path],
    folder: Path,
    dtype: str | None = None,
    *,
    parts: Mapping[str, PublishedTensor] | None = None,
    prove: Callable[[Path], dict[str, Any]] = lambda folder: {},
    advance: Callable[[int], None] = lambda count: None,
) -> bool:
    """Export a DCP checkpoint to `folder`, whole or not at all; returns False if this very one is there already.

    `assets` is the folder that `save_assets` wrote, or a function that says where it is and is asked last. The
    weights are cast to `dtype` (torch's name) when given, and named and cut as `parts` say. `prove` checks the export
    before it gets its name, and what it returns goes into the report. `advance` is told the bytes that were written. An
    export of another checkpoint of the same name (its steps were done again), or what is left of one, is moved aside.
    Raises UserError if another process made one in the meantime.
    """
    origin = {"metadata_sha256": sha256(checkpoint / ".metadata"), "dtype": dtype}
    if there := folder.exists():
        report = read_report(folder)
        if origin.items() <= report.items() and _is_whole(folder, report):
            return False
    tensors = read_tensors(checkpoint)
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with new_folder(folder) as temporary:
        digests = convert_dcp_to_hf(tensors, temporary, dtype, parts, advance=advance)
        asset_folder = assets() if callable(assets) else assets
        shutil.copytree(asset_folder, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns(STRUCTURE))
        _set_dtype(temporary / "config.json", dtype or main_dtype(found))
        write_report(
            temporary,
            digests,
            checkpoint=str(checkpoint.resolve()),
            **origin,
            tensors=len(tensors),
            parameters=sum(prod(shape) for _, shape in found.values()),
            checks={"bytes": "every tensor reads back as it was written"} | prove(temporary),
        )
        if there:
            aside = (folder.with_name(f"{folder.name}.old-{n}") for n in count(1))
            os.rename(folder, next(path for path in aside if not path.exists()))
    return True


def _is_whole(folder: Path, report: Mapping[str, Any]) -> bool:
    """Whether the files that a report lists are there, and the weights as long as their headers say."""
    try:
        return all((folder / name).is_file() for name in report["files"]) and bool(read_headers(find_files(folder)))
    except (OSError, UserError, KeyError, TypeError):
        return False


def _set_dtype(path: Path, dtype: str) -> None:
    """Say in a config.json what type the weights have: `from_pretrained` loads them as what it says there."""
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)
    path.write_text(json.dumps(config | {"dtype": dtype}, indent=2, sort_keys=True) + "\n")
