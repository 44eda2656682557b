"""DCP -> Hugging Face: bash scripts/flame.sh export --path RUN [--step N] [--config C] [--tokenizer T]

Streams tensor after tensor, so that memory does not grow with the model, and checks what it wrote; the results are in
conversion_report.json. Exit code 2: a mistake, in one line; 1: the tensors are not those of the config's model, or the
export is not the model that was trained, or the disk is full.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if find_spec("torchtitan") is None:  # another Python than the one that scripts/setup.sh finds or makes
    command = f"bash {Path(__file__).resolve().with_name('flame.sh')} export ..."
    print(f"flame: {sys.executable} has no torchtitan; with the Python that has it: {command}", file=sys.stderr)
    sys.exit(2)

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's flame

from flame.checkpoint.commit import complete_steps, inspect_checkpoint
from flame.checkpoint.dtypes import FLOATS, SIZES
from flame.checkpoint.structure import ConversionError, Structure, check_structure
from flame.config.arguments import Parser
from flame.config.files import read_json
from flame.convert.dcp_file import CorruptedError, read_tensors
from flame.convert.export import export_checkpoint
from flame.convert.hf_structure import read_trained_structure
from flame.convert.hf_weights import specs_of
from flame.convert.output import REPORT, check_new, copy_assets
from flame.convert.tokenizer import compare_tokenizer
from flame.convert.verify import HOLDS, check_logits, too_large
from flame.errors import FULL, UserError

if TYPE_CHECKING:
    from flame.config.schema import JobConfig

OURS = {"--model.config": "--config", "--model.tokenizer_path": "--tokenizer"}  # settings of a job: flags of this


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; exits with code 2 for what it does not know."""
    parser = Parser(prog="flame export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, required=True, help="a run folder, or a DCP checkpoint itself")
    parser.add_argument("--step", type=int, default=-1, help="of the run; default: -1, its newest complete checkpoint")
    parser.add_argument("--config", help="config.json, folder or hub id; default: what the run recorded")
    parser.add_argument("--tokenizer", help='"byte", folder, tokenizer.json or hub id; default: what the run recorded')
    parser.add_argument("--dtype", choices=FLOATS, help="cast to this type; default: as trained")
    parser.add_argument("--output", type=Path, help="a folder that does not exist; default: hf/step-N in the run")
    parser.add_argument("--no_verify", action="store_true", help="check neither tensors nor logits against the config")
    parser.add_argument("--trust_run", action="store_true", help="run code that the run's config.toml names")
    return parser.parse_args(argv)


def read_run(given: argparse.Namespace) -> "JobConfig":
    """The config of the run that the command line names, the default if it has none. Raises UserError."""
    from flame.runtime import device

    device.choose()  # before the import of torchtitan, which reads the device
    from flame.config.parser import parse_recorded
    from flame.config.schema import JobConfig

    if not (given.path / "config.toml").is_file():
        return JobConfig()
    try:
        return parse_recorded(given.path, trusted=given.trust_run)
    except UserError as error:
        hint = "; ".join(filter(None, (error.hint, "or give --path a checkpoint itself")))
        raise UserError(error.setting, error.found, error.allowed, hint) from None


def find_checkpoint(path: Path, step: int, run: "JobConfig") -> Path:
    """The checkpoint of a run's step (-1: the newest). `run` is its config. Raises UserError if it has none."""
    if (path / ".metadata").is_file():
        if step != -1:
            raise UserError("--step", step, hint=f"--path {path} is a checkpoint itself, not a run of several steps")
        if reason := inspect_checkpoint(path).corruption:
            raise UserError("--path", path, "a complete checkpoint", reason)
        return path
    folder = path / run.checkpoint.folder
    steps = complete_steps(folder)
    if not steps:
        raise UserError("--path", path, "a run or a checkpoint", f"there is no complete checkpoint in {folder}")
    if step != -1 and step not in steps:
        raise UserError("--step", step, f"one of the complete steps of {folder}: {', '.join(map(str, steps))}")
    return folder / f"step-{steps[-1] if step == -1 else step}"


def check_json(recorded: Path) -> None:
    """Raises UserError if what a run recorded of its model and tokenizer is not JSON objects."""
    for path in (recorded / name for name in ("config.json", "torchtitan.json", "tokenizer_config.json")):
        try:
            if path.is_file():
                read_json(path)
        except ValueError as error:
            raise UserError(str(path), hint=f"is corrupted ({error}); --config and --tokenizer replace it") from None


@contextmanager
def models_enabled(run: "JobConfig") -> Iterator[None]:
    """A block that builds models without a log, the run's own (--model.import) too. Raises UserError."""
    from flame.models.hf import import_models

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            if module := run.experimental.custom_import:
                import_models(module)
            yield
        finally:
            logging.disable(logging.NOTSET)


def build_structure(given: argparse.Namespace, run: "JobConfig", assets: Path) -> Structure | None:
    """The tensors of the model, whose config is written to `assets` if the command line names it or the tokenizer.

    None if it cannot be built and need not be verified. Raises UserError if it must.
    """
    try:
        with models_enabled(run):
            if given.config or given.tokenizer:
                from flame.data.tokenize import build_tokenizer
                from flame.models import hf

                recorded = str(given.path / "model")
                config, tokenizer = given.config or recorded, build_tokenizer(given.tokenizer or recorded)
                _, hf_config = hf.load_hf_config(config, tokenizer=tokenizer, grow_vocab=True)
                hf.save_assets(assets, hf.build_on_meta(hf_config, config), tokenizer.hf, hf.read_generation(config))
            return read_trained_structure(assets)
    except UserError as error:
        if given.no_verify and (assets / "config.json").is_file():
            return None
        flag, *value = error.setting.split(" ", 1)
        hint = "; ".join(filter(None, (error.hint, "--no_verify converts without a look at the model")))
        raise UserError(" ".join([OURS.get(flag, flag), *value]), error.found, error.allowed, hint) from None


def verify(given: argparse.Namespace, run: "JobConfig", checkpoint: Path, tensors: Any, export: Path) -> dict:
    """The results for the report of an export; its structure was checked. Raises ConversionError."""
    if given.no_verify:
        return {"structure": "not checked", "logits": "not compared", "tokenizer": "not compared"}
    with models_enabled(run):
        logits = too_large(tensors) or check_logits(checkpoint, given.dtype, export)
        return {"structure": HOLDS, "logits": logits, "tokenizer": compare_tokenizer(export)}


def convert(given: argparse.Namespace) -> str:
    """Convert as the command line says; returns the line to print.

    Raises UserError, ConversionError, CorruptedError and OSError.
    """
    if not given.path.is_dir():
        raise UserError("--path", f"no folder {given.path}", "a run or a checkpoint")
    run = read_run(given)
    checkpoint = find_checkpoint(given.path, given.step, run)
    if checkpoint == given.path and not given.output:
        raise UserError("--output", hint=f"needed, as --path {given.path} is a checkpoint itself, not a run")
    output = given.output or given.path / "hf" / checkpoint.name
    check_new("--output", output)
    recorded = given.path / "model"
    asked = {"--config": given.config, "--tokenizer": given.tokenizer}
    if not (recorded / "config.json").is_file() and (absent := [flag for flag, value in asked.items() if not value]):
        raise UserError(" and ".join(absent), hint=f"needed, as {recorded} has no config.json and tokenizer of the run")
    if not given.config:
        check_json(recorded)
    if not any(asked.values()) and not (recorded / "tokenizer.json").is_file():
        raise UserError("--tokenizer", hint=f"needed, as {recorded} has no tokenizer.json of the run")
    tensors = specs_of(read_tensors(checkpoint))
    total = sum(prod(shape) * SIZES[given.dtype if given.dtype and d in FLOATS else d] for d, shape in tensors.values())

    with tempfile.TemporaryDirectory() as folder, tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        assets = Path(folder, "assets")
        if not any(asked.values()):
            copy_assets(recorded, assets)
        structure = build_structure(given, run, assets)
        if structure and not given.no_verify:
            check_structure(tensors, structure)
        export_checkpoint(
            checkpoint,
            assets,
            output,
            given.dtype,
            published_as=structure.published_as if structure else None,
            verify=partial(verify, given, run, checkpoint, tensors),
            advance=bar.update,
        )
    return f"{output}: {len(tensors)} tensors, {total:,} bytes; checks in {REPORT}"


def main(argv: list[str]) -> int:
    """Exit code: 0, 1 for an unfaithful conversion, a corrupted checkpoint or a full disk, 2 for a mistake."""
    given = parse(argv)
    try:
        print(convert(given))
    except (UserError, ConversionError, CorruptedError) as error:
        print(f"flame: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except OSError as error:
        print(f"flame: {given.output or given.path}: {error}", file=sys.stderr)
        return 1 if error.errno in FULL else 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
