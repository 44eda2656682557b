"""Hugging Face -> DCP: python scripts/convert_hf_to_dcp.py --model FOLDER --checkpoint RUN/checkpoint/step-0

Writes the weights of safetensors files as a checkpoint of a model alone, piece by piece, and reads it again. A run in
RUN starts from it; so does any other with --checkpoint.initial_load_path. Exit code 2: a mistake, said in one line; 1:
the tensors are not those of the folder's config, or the disk is full.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flame.checkpoint.structure import ConversionError, Structure, check_structure
from flame.convert.conversion import convert_hf_to_dcp
from flame.convert.hf_structure import read_structure
from flame.convert.hf_weights import checksum, under_own_names, untied
from flame.convert.report import REPORT, new_folder, sha256, write_report
from flame.convert.safetensors_file import Entry, find_files, read_headers
from flame.convert.verify import HOLDS
from flame.errors import FULL, UserError

TITAN = "torchtitan.json"  # beside the config.json of what was trained as one of torchtitan's models


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; argparse exits with code 2 for what it does not know."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="a Hugging Face folder, or its files")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the folder to write, which must not exist")
    parser.add_argument("--no_verify", action="store_true", help="do not check the tensors against config.json")
    return parser.parse_args(argv)


def convert(given: argparse.Namespace) -> str:
    """Convert as the command line says; returns what to tell. Raises UserError, ConversionError and OSError."""
    if given.checkpoint.exists():
        raise UserError(f"--checkpoint {given.checkpoint}: exists already; name a folder that does not")
    folder = given.model[0] if len(given.model) == 1 and given.model[0].is_dir() else None
    if absent := [str(path) for path in given.model if not path.exists()]:
        raise UserError(f"--model {absent[0]}: there is no such folder or file; of a hub id, download it first")
    files = find_files(folder) if folder else given.model
    entries = read_headers(files)
    if not entries:
        raise UserError(f"--model {given.model[0]}: holds no tensors")
    structure = None
    checks: dict[str, Any] = {"bytes": "every tensor reads back as it was written", "structure": "not checked"}
    if folder and not given.no_verify:
        structure, entries = check(folder, entries)
        checks["structure"] = HOLDS
    total = sum(entry.nbytes for entry in entries.values())
    bar = tqdm(total=total, unit="B", unit_scale=True, disable=None)
    with bar, new_folder(given.checkpoint) as temporary:
        convert_hf_to_dcp(entries, temporary, structure, advance=bar.update)
        sources = {str(file.resolve()): sha256(file) for file in files}
        write_report(temporary, {}, sources=sources, tensors=len(entries), checks=checks)
    said = f"{given.checkpoint}: {len(entries)} tensors, {total:,} bytes; checks in {REPORT}"
    if folder and (folder / TITAN).is_file():
        said += f"; by transformers' names: torchtitan's model starts from {folder} (--checkpoint.initial_load_in_hf)"
    return said


def check(folder: Path, entries: dict[str, Entry]) -> tuple[Structure, dict[str, Entry]]:
    """The structure of the folder's config.json, and the tensors without those that transformers leaves aside.

    Raises UserError and ConversionError.
    """
    from flame.runtime import device

    device.choose()  # before the import of torchtitan, which reads the device
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--model {folder}: found no config.json to check the tensors against; --no_verify does without"
        )
    structure = read_structure(folder)
    published = structure.published
    entries = {name: entry for name, entry in entries.items() if not published.ignores(name)}
    entries = under_own_names(entries, published)
    check_structure({name: (entry.dtype, entry.shape) for name, entry in entries.items()}, published)
    for complaint in untied(entries.keys(), published, lambda name: checksum(entries[name])):
        raise ConversionError(f"--model {folder}: {complaint}")
    return structure, entries


def main(argv: list[str]) -> int:
    """Exit code: 0, 1 for tensors of another model or a full disk, 2 for a mistake."""
    given = parse(argv)
    try:
        print(convert(given))
    except UserError as error:
        print(f"convert_hf_to_dcp: {error}", file=sys.stderr)
        return 2
    except ConversionError as error:
        print(f"convert_hf_to_dcp: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"convert_hf_to_dcp: {given.checkpoint}: {error}", file=sys.stderr)
        return 1 if error.errno in FULL else 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
