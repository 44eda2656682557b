"""`python -m flame.data show|verify|bench|pack`: what runs were fed, how fast, and from which files; see docs/."""

import argparse
import sys
import warnings
from pathlib import Path

from flame.config.parser import parse
from flame.config.schema import Data, Training
from flame.data import inspect
from flame.data.bench import bench
from flame.data.corpus import pack_sources
from flame.data.source import build_sources
from flame.data.tokenize import build_tokenizer
from flame.errors import UserError


def main(argv: list[str]) -> int:
    """Exit code: 0 fine, 1 the data differ, 2 a mistake of the user, said in one line."""
    parser = argparse.ArgumentParser(prog="python -m flame.data", description="What runs were fed, and how fast.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="decode what a step was fed, and compare it with the run's ledger")
    show.add_argument("run", type=Path, help="run folder")
    show.add_argument("--step", type=int, required=True)
    show.add_argument("--rank", type=int, help="only the rows of this data-parallel rank")
    show.add_argument("--ranks", type=int, help="data-parallel ranks; default: those of the run")
    show.add_argument("--full", action="store_true", help="whole text instead of the first and last characters")
    verify = commands.add_parser("verify", help="say up to which step two runs saw the same data")
    verify.add_argument("run", type=Path)
    verify.add_argument("other", type=Path)
    speed = commands.add_parser(
        "bench", help="measure a job's data stream", usage="%(prog)s JOB.toml [flags of the job]"
    )
    speed.add_argument("job", help="TOML of the job; its flags may follow")
    pack = commands.add_parser("pack", help="tokenize sources into Megatron's OUT.bin and OUT.idx")
    pack.add_argument("out", type=Path, help="path of the two files without their endings")
    pack.add_argument("--dataset", required=True, help="as --training.dataset")
    pack.add_argument("--tokenizer", required=True, help="as --model.tokenizer_path")
    for name in ("dataset-name", "dataset-split", "data-dir", "data-files"):
        pack.add_argument(f"--{name}", help=f"as --training.{name.replace('-', '_')}")
    pack.add_argument("--column", help="as --data.column")
    pack.add_argument("--streaming", action="store_true", help="as --training.streaming")
    pack.add_argument("--max-bad-rows", type=float, default=Data.max_bad_rows, help="as --data.max_bad_rows")
    given, flags = parser.parse_known_args(argv)
    if flags and given.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # checkpoints are read without it
    try:
        if given.command == "bench":
            bench(parse(["--job.config_file", given.job, *flags]))
            same = True
        elif given.command == "pack":
            training, data = Training(), Data(column=given.column)
            for name in ("dataset", "dataset_name", "dataset_split", "data_dir", "data_files", "streaming"):
                setattr(training, name, getattr(given, name))
            sources = build_sources(training, data)
            documents, tokens = pack_sources(given.out, sources, build_tokenizer(given.tokenizer), given.max_bad_rows)
            print(f"{documents:,} documents, {tokens:,} tokens: {given.out}.bin, {given.out}.idx")
            same = True
        elif given.command == "show":
            same = inspect.show(given.run, given.step, given.rank, given.ranks, given.full)
        else:
            same = inspect.verify(given.run, given.other)
    except UserError as error:
        print(f"flame: {error}", file=sys.stderr)
        return 2
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
