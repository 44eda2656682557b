"""`python -m flame.data show|verify|bench|pack`: what runs were fed, how fast, and from which files; see docs/."""

import argparse
import sys
import warnings
from pathlib import Path

from flame.config.parser import parse
from flame.config.schema import Data, Training
from flame.data.bench import bench
from flame.data.inspect import show
from flame.data.ledger import verify
from flame.data.megatron import pack_sources
from flame.data.source import build_sources
from flame.data.tokenize import build_tokenizer
from flame.errors import UserError

LISTS = ("dataset_name", "dataset_split", "data_dir", "data_files")


def main(argv: list[str]) -> int:
    """Exit code: 0 fine, 1 the data differ, 2 a mistake of the user, reported in one line."""
    parser = argparse.ArgumentParser(prog="python -m flame.data", description="What runs were fed, and how fast.")
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("show", help="decode what a step was fed, and compare it with the run's ledger")
    shown.add_argument("run", type=Path, help="run folder")
    shown.add_argument("--step", type=int, required=True)
    shown.add_argument("--rank", type=int, help="only the rows of this data-parallel rank")
    shown.add_argument("--ranks", type=int, help="data-parallel ranks; default: those of the run")
    shown.add_argument("--full", action="store_true", help="whole text instead of the first and last characters")
    verified = commands.add_parser("verify", help="report up to which step two runs saw the same data")
    verified.add_argument("run", type=Path)
    verified.add_argument("other", type=Path)
    speed = commands.add_parser(
        "bench", help="measure a job's data stream", usage="%(prog)s JOB.toml [flags of the job]"
    )
    speed.add_argument("job", help="TOML of the job; its flags may follow")
    packed = commands.add_parser("pack", help="tokenize sources into Megatron's OUT.bin and OUT.idx")
    packed.add_argument("out", type=Path, help="path of the two files without their endings")
    packed.add_argument("--dataset", required=True, help="as --training.dataset")
    packed.add_argument("--tokenizer", required=True, help="as --model.tokenizer_path")
    for name in LISTS:
        packed.add_argument(f"--{name.replace('_', '-')}", help=f"as --training.{name}")
    packed.add_argument("--column", help="as --data.column")
    packed.add_argument("--streaming", action="store_true", help="as --training.streaming")
    packed.add_argument("--max-bad-rows", type=float, default=Data.max_bad_rows, help="as --data.max_bad_rows")
    given, flags = parser.parse_known_args(argv)
    if flags and given.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # checkpoints are read without it
    same = True
    try:
        if given.command == "show":
            same = show(given.run, given.step, given.rank, given.ranks, given.full)
        elif given.command == "verify":
            same = verify(given.run, given.other)
        elif given.command == "bench":
            bench(parse(["--job.config_file", given.job, *flags]))
        else:
            lists = {name: getattr(given, name) for name in LISTS}
            training = Training(dataset=given.dataset, streaming=given.streaming, **lists)
            sources = build_sources(training, Data(column=given.column))
            documents, tokens = pack_sources(given.out, sources, build_tokenizer(given.tokenizer), given.max_bad_rows)
            print(f"{documents:,} documents, {tokens:,} tokens: {given.out}.bin, {given.out}.idx")
    except UserError as error:
        print(f"flame: {error}", file=sys.stderr)
        return 2
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
