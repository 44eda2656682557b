"""DCP -> Hugging Face: python scripts/convert_dcp_to_hf.py --path RUN [--step N] [--config C] [--tokenizer T]

Streams tensor after tensor, so that memory does not grow with the model, and checks what it wrote; the findings are in
conversion_report.json. Exit code 2: a mistake, said in one line; 1: the tensors are not those of the config's model, or
the export is not the model that was trained, or the disk is full.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import tomli
from tqdm import tqdm

from flame.checkpoint.commit import complete_steps, find_corruption
from flame.checkpoint.dtypes import FLOATS, SIZES
from flame.checkpoint.structure import ConversionError, TensorSpecs, check_structure, load_structure, save_structure
from flame.convert.dcp_file import CorruptedError, read_tensors
from flame.convert.export import export_checkpoint
from flame.convert.report import REPORT
from flame.convert.verify import HOLDS, too_large
from flame.errors import FULL, UserError


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; argparse exits with code 2 for what it does not know."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, required=True, help="a run folder, or a DCP checkpoint itself")
    parser.add_argument("--step", type=int, default=-1, help="of the run; default: -1, its newest complete checkpoint")
    parser.add_argument("--config", help="config.json, folder or hub id; default: what the run recorded")
    parser.add_argument("--tokenizer", help='"byte", folder, tokenizer.json or hub id; default: what the run recorded')
    parser.add_argument("--dtype", choices=FLOATS, help="cast to this type; default: as trained")
    parser.add_argument("--output", type=Path, help="a folder that does not exist; default: hf/step-N in the run")
    parser.add_argument("--no_verify", action="store_true", help="check neither tensors nor logits against the config")
    return parser.parse_args(argv)


def read_run(path: Path) -> dict[str, Any]:
    """The config.toml of a run, {} if there is none. Raises UserError."""
    record = path / "config.toml"
    try:
        return tomli.loads(record.read_text()) if record.is_file() else {}
    except ValueError as error:
        raise UserError(f"--path {path}: {record} is damaged ({error}); name a checkpoint itself") from None


def find_checkpoint(path: Path, step: int, run: dict[str, Any]) -> Path:
    """The checkpoint of a run's step (-1: the newest). `run` is its config.toml. Raises UserError."""
    if (path / ".metadata").is_file():
        if step != -1:
            raise UserError(f"--step {step}: --path {path} is a checkpoint itself, not a run of several steps")
        if reason := find_corruption(path):
            raise UserError(f"--path {path}: not a complete checkpoint: {reason}")
        return path
    folder = path / run.get("checkpoint", {}).get("folder", "checkpoint")
    steps = complete_steps(folder)
    if not steps:
        raise UserError(f"--path {path}: found no complete checkpoint in {folder}")
    if step != -1 and step not in steps:
        raise UserError(f"--step {step}: {folder} holds the complete steps {', '.join(map(str, steps))}")
    return folder / f"step-{steps[-1] if step == -1 else step}"


def check_json(recorded: Path) -> None:
    """Raises UserError if what a run recorded of its model does not hold objects."""
    for path in (recorded / "config.json", recorded / "torchtitan.json"):
        try:
            if path.is_file() and not isinstance(json.loads(path.read_bytes()), dict):
                raise ValueError("no object")
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); --config and --tokenizer take its place") from None


class Model:
    """What the config says of the model, found by flame.convert.verify in its own process while tensors are copied."""

    def __init__(self, found: TensorSpecs, assets: Path, verified: bool, module: str) -> None:
        self.found, self.assets, self.verified = found, assets, verified
        self.verify = [sys.executable, "-m", "flame.convert.verify", "--import", module]
        self.structure = load_structure(assets)
        self.building: subprocess.Popen[str] | None = None

    def build(self, *arguments: str) -> None:
        """Start to build the model, unless its structure is known; `arguments` say from what."""
        if self.structure is None:
            self.building = self._start("structure", str(self.assets), *arguments)
        else:
            self.check()

    def check(self) -> None:
        """Wait until the structure is known, and check it. Raises UserError and ConversionError."""
        if self.building:
            building, self.building = self.building, None
            try:
                self._finish(building)
            except UserError as error:
                if self.verified or not (self.assets / "config.json").is_file():
                    raise UserError(f"{error} (--no_verify converts without a look at the model)") from None
                return
            self.structure = load_structure(self.assets)
        assert self.structure is not None
        if self.verified:
            check_structure(self.found, self.structure)

    def look(self) -> None:
        """Check the structure if it is known by now. Raises _Published if tensors must be cut or named otherwise."""
        if self.building and self.building.poll() is not None:
            self.finish()

    def finish(self) -> Path:
        """The folder of config and tokenizer, once the structure is checked. Raises as `look`."""
        if self.building:
            self.check()
            if self.structure and self.structure.published_as:
                raise _Published
        return self.assets

    def prove(self, checkpoint: Path, dtype: str | None, export: Path) -> dict[str, Any]:
        """What the checks found, for the report. Raises ConversionError."""
        if not self.verified:
            return {"structure": "not checked", "logits": "not compared"}
        if reason := too_large(self.found):
            return {"structure": HOLDS, "logits": reason}
        cast = ["--dtype", dtype] if dtype else []
        try:
            said = self._finish(self._start("logits", str(checkpoint), str(export), *cast))
        except UserError as error:
            return {"structure": HOLDS, "logits": f"not compared: {error}"}
        return {"structure": HOLDS, "logits": json.loads(said)}

    def close(self) -> None:
        """End the process if it is still at work."""
        if self.building:
            self.building.kill()
            self.building.communicate()

    def _start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*self.verify, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def _finish(self, process: subprocess.Popen[str]) -> str:
        output, said = process.communicate()
        if process.returncode == 0:
            return output
        message = said.rpartition("flame: ")[2].strip() or "flame.convert.verify was ended"
        for flag, ours in (("--model.config", "--config"), ("--model.tokenizer_path", "--tokenizer")):
            message = message.replace(flag, ours)
        raise (UserError if process.returncode == 2 else ConversionError)(message)


class _Published(Exception):
    """The model is published under other names than it is trained with, which turned out while it was copied."""


def convert(given: argparse.Namespace) -> str:
    """Convert as the command line says; returns what to tell.

    Raises UserError, ConversionError, CorruptedError and OSError.
    """
    run = read_run(given.path)
    checkpoint = find_checkpoint(given.path, given.step, run)
    if checkpoint == given.path and not given.output:
        raise UserError(f"--output: needed, as --path {given.path} is a checkpoint itself, not a run")
    output = given.output or given.path / "hf" / checkpoint.name
    if output.exists():
        raise UserError(f"--output {output}: exists already; name a folder that does not")
    recorded = given.path / "model"
    asked = {"--config": given.config, "--tokenizer": given.tokenizer}
    if not (recorded / "config.json").is_file() and (absent := [flag for flag, value in asked.items() if not value]):
        raise UserError(f"{' and '.join(absent)}: needed, as {recorded} holds no config.json and tokenizer of the run")
    if not given.config:
        check_json(recorded)
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in read_tensors(checkpoint).items()}
    total = sum(prod(shape) * SIZES[given.dtype if given.dtype and d in FLOATS else d] for d, shape in found.values())

    with tempfile.TemporaryDirectory() as folder, tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        assets = Path(folder, "assets")
        if not any(asked.values()):
            shutil.copytree(recorded, assets)
        model = Model(found, assets, not given.no_verify, run.get("experimental", {}).get("custom_import", ""))

        def advance(count: int) -> None:
            bar.update(count)
            model.look()

        prove = partial(model.prove, checkpoint, given.dtype)
        export = partial(export_checkpoint, checkpoint, model.finish, output, given.dtype, prove=prove, advance=advance)
        try:
            model.build(*[f"{flag}={value or recorded}" for flag, value in asked.items() if any(asked.values())])
            try:
                export(parts=model.structure.published_as if model.structure else None)
            except _Published:
                bar.reset()
                assert model.structure is not None
                export(parts=model.structure.published_as)
        finally:
            model.close()
        if model.structure is not None and not any(asked.values()):
            with suppress(OSError):  # the run may be anybody's; without it the next conversion takes longer
                save_structure(model.structure, recorded)
    return f"{output}: {len(found)} tensors, {total:,} bytes; checks in {REPORT}"


def main(argv: list[str]) -> int:
    """Exit code: 0, 1 for an unfaithful conversion, a damaged checkpoint or a full disk, 2 for a mistake."""
    given = parse(argv)
    try:
        print(convert(given))
    except UserError as error:
        print(f"convert_dcp_to_hf: {error}", file=sys.stderr)
        return 2
    except (ConversionError, CorruptedError) as error:
        print(f"convert_dcp_to_hf: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"convert_dcp_to_hf: {given.output or given.path}: {error}", file=sys.stderr)
        return 1 if error.errno in FULL else 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
