"""`flame.sh data show|verify|bench|pack`: what runs were fed, how fast, and from which files; see docs/."""

import argparse
import math
import runpy
import sys
import warnings
from pathlib import Path

from flame.config.arguments import Parser
from flame.config.schema import Data, Training
from flame.data.inspect import show
from flame.data.ledger import verify
from flame.data.megatron import encode_all, write
from flame.data.source import build_sources
from flame.data.tokenize import build_tokenizer
from flame.errors import UserError

BENCHMARK = Path(__file__).parents[2] / "scripts/benchmark/stream.py"
LISTS = ("dataset_name", "dataset_split", "data_dir", "data_files")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and the flags of the job that follow bench; exits with code 2 if it is wrong."""
    parser = Parser(prog="flame data", description="What runs were fed, and how fast.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("show", help="decode what a step was fed, and compare it with the run's ledger")
    command.add_argument("run", type=Path, help="run folder")
    command.add_argument("--step", type=int, required=True)
    command.add_argument("--rank", type=int, help="only the rows of this data-parallel rank")
    command.add_argument("--ranks", type=int, help="data-parallel ranks; default: those of the run")
    command.add_argument("--full", action="store_true", help="whole text instead of the first and last characters")
    command.add_argument("--trust_run", action="store_true", help="run code that the run's config.toml names")
    command = commands.add_parser("verify", help="report up to which step two runs saw the same data")
    command.add_argument("run", type=Path)
    command.add_argument("other", type=Path)
    usage = "%(prog)s JOB.toml [flags of the job]"
    command = commands.add_parser("bench", help="measure a job's data stream", usage=usage)
    command.add_argument("job", help="TOML of the job; its flags may follow")
    command = commands.add_parser("pack", help="tokenize sources into Megatron's OUT.bin and OUT.idx")
    command.add_argument("out", type=Path, help="path of the two files without their endings")
    command.add_argument("--dataset", required=True, help="as --training.dataset")
    command.add_argument("--tokenizer", required=True, help="as --model.tokenizer_path")
    for name in LISTS:
        command.add_argument(f"--{name.replace('_', '-')}", help=f"as --training.{name}")
    command.add_argument("--column", help="as --data.column")
    command.add_argument("--streaming", action="store_true", help="as --training.streaming")
    command.add_argument("--max-bad-rows", type=float, default=Data.max_bad_rows, help="as --data.max_bad_rows")
    given, flags = parser.parse_known_args(argv)
    if flags and given.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    return given, flags


def main(argv: list[str]) -> int:
    """Exit code: 0 fine, 1 the data differ, 2 a mistake of the user, reported in one line."""
    given, flags = parse(argv)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # checkpoints are read without it
    same = True
    try:
        if given.command == "pack" and not 0 <= given.max_bad_rows < math.inf:
            raise UserError("--max-bad-rows", given.max_bad_rows, "0 or more, and finite")
        if given.command == "show":
            same = show(given.run, given.step, given.rank, given.ranks, given.full, given.trust_run)
        elif given.command == "verify":
            same = verify(given.run, given.other)
        elif given.command == "bench":
            benchmark = runpy.run_path(str(BENCHMARK))
            return benchmark["main"]([given.job, *flags])
        else:
            lists = {name: getattr(given, name) for name in LISTS}
            training = Training(dataset=given.dataset, streaming=given.streaming, **lists)
            sources, tokenizer = build_sources(training, Data(column=given.column)), build_tokenizer(given.tokenizer)
            ids = encode_all(sources, tokenizer, given.max_bad_rows)
            try:
                documents, tokens = write(given.out, ids, tokenizer.vocab_size)
            except OSError as error:
                raise UserError("OUT", hint=str(error)) from None
            for source in sources:
                print(*source.describe(), sep="\n")
            print(f"{documents:,} documents, {tokens:,} tokens: {given.out}.bin, {given.out}.idx")
    except UserError as error:
        print(f"flame: {error}", file=sys.stderr)
        return 2
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
