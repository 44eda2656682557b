"""`python -m flame.data show|verify|bench`: what runs were fed, and how fast; docs/ledger.md has examples."""

import argparse
import sys
import warnings
from pathlib import Path

from flame.config import parse
from flame.data import inspect
from flame.data.bench import bench
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
    given, flags = parser.parse_known_args(argv)
    if flags and given.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # checkpoints are read without it
    try:
        if given.command == "bench":
            bench(parse(["--job.config_file", given.job, *flags]))
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
