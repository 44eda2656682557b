"""Hugging Face -> DCP: bash scripts/flame.sh import --model FOLDER --checkpoint RUN/checkpoint/step-0

Writes the weights of safetensors files as a checkpoint of a model alone, piece by piece, and reads it again. A run in
RUN starts from it; so does any other with --checkpoint.initial_load_path. Exit code 2: a mistake, in one line; 1: the
tensors are not those of the folder's config, or the disk is full.
"""

import argparse
import sys
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

if find_spec("torchtitan") is None:  # another Python than the one that scripts/setup.sh finds or makes
    command = f"bash {Path(__file__).resolve().with_name('flame.sh')} import ..."
    print(f"flame: {sys.executable} has no torchtitan; with the Python that has it: {command}", file=sys.stderr)
    sys.exit(2)

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's flame

from flame.checkpoint.commit import hash_file
from flame.checkpoint.structure import ConversionError, Structure, check_structure
from flame.config.arguments import Parser
from flame.convert.hf_structure import read_structure
from flame.convert.hf_weights import find_untied, read_weights, specs_of
from flame.convert.output import REPORT, check_new, new_folder, write_report
from flame.convert.safetensors_file import find_files
from flame.convert.verify import HOLDS
from flame.errors import FULL, UserError

TITAN = "torchtitan.json"  # beside the config.json of what was trained as one of torchtitan's models


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; exits with code 2 for what it does not know."""
    parser = Parser(prog="flame import", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="a Hugging Face folder, or its files")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the folder to write, which must not exist")
    parser.add_argument("--no_verify", action="store_true", help="do not check the tensors against config.json")
    return parser.parse_args(argv)


def build_structure(folder: Path) -> Structure:
    """The tensors of the model of a folder's config.json. Raises UserError if it has none or it cannot be built."""
    from flame.runtime import device

    device.choose()  # before the import of torchtitan, which reads the device
    if not (folder / "config.json").is_file():
        raise UserError(
            "--model", folder, "a folder with a config.json to check the tensors against", "--no_verify does without"
        )
    return read_structure(folder)


def convert(given: argparse.Namespace) -> str:
    """Convert as the command line says; returns the line to print. Raises UserError, ConversionError and OSError."""
    check_new("--checkpoint", given.checkpoint)
    folder = given.model[0] if len(given.model) == 1 and given.model[0].is_dir() else None
    if absent := [path for path in given.model if not path.exists()]:
        raise UserError("--model", absent[0], "a folder or file on this machine", "a hub id has to be downloaded first")
    files = find_files(folder) if folder else given.model
    structure = build_structure(folder) if folder and not given.no_verify else None
    weights = read_weights(files, structure)
    if not weights.entries:
        raise UserError("--model", given.model[0], hint="it has no tensors")
    if structure:
        check_structure(specs_of(weights.entries), structure.published)
        if problem := find_untied(weights.entries, structure.published):
            raise ConversionError(f"--model {folder}: {problem}")
    from flame.convert.hf_to_dcp import convert_hf_to_dcp  # here: it imports torch

    entries = [entry for entry, _ in weights.placed()]
    total = sum(entry.nbytes for entry in entries)
    bar = tqdm(total=total, unit="B", unit_scale=True, disable=None)
    with bar, new_folder(given.checkpoint) as temporary:
        convert_hf_to_dcp(weights, temporary, advance=bar.update)
        write_report(
            temporary,
            {},
            sources={str(file.resolve()): hash_file(file, sha256) for file in files},
            tensors=len(entries),
            checks={
                "bytes": "every tensor reads back as it was written",
                "structure": HOLDS if structure else "not checked",
            },
        )
    done = f"{given.checkpoint}: {len(entries)} tensors, {total:,} bytes; checks in {REPORT}"
    if folder and (folder / TITAN).is_file():
        done += f"; by transformers' names: torchtitan's model starts from {folder} (--checkpoint.initial_load_in_hf)"
    return done


def main(argv: list[str]) -> int:
    """Exit code: 0, 1 for tensors of another model or a full disk, 2 for a mistake."""
    given = parse(argv)
    try:
        print(convert(given))
    except (UserError, ConversionError) as error:
        print(f"flame: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except OSError as error:
        print(f"flame: {given.checkpoint}: {error}", file=sys.stderr)
        return 1 if error.errno in FULL else 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
