"""`flame.sh drills [NAME ...] [--nproc N] [--keep FOLDER] [--flags FLAGS ...]`.

Exit code: 0, 1 if a check fails, 2 for a usage error, 130 after Ctrl-C.
"""

import argparse
import functools
import shutil
import sys
import tempfile
import time
from pathlib import Path

from flame.config.arguments import Parser
from flame.drills.drill import DRILLS, kill_in_save
from flame.errors import INTERRUPTED, REFUSED, UserError


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; exits with code 2 if it is wrong."""
    lines = [f"  {name:<14}{drill.__doc__}" for name, drill in DRILLS.items()]
    parser = Parser(
        prog="flame drills",
        description="Make a tiny job fail on purpose, and check that nothing is lost. Drills:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("drill", nargs="*", help="which; default: all")
    parser.add_argument("--nproc", type=int, default=2, choices=[1, 2, 4, 8], help="ranks, on this machine (2)")
    parser.add_argument("--times", type=int, default=3, help="kills of kill_in_save (3)")
    parser.add_argument("--keep", type=Path, help="folder for the runs, kept; default: a temporary one")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="added to the jobs' flags; comes last")
    return parser.parse_args(argv)


def make_folder(given: argparse.Namespace) -> Path:
    """The folder of the runs. Raises UserError for a drill that does not exist, --times below 1, or a bad --keep."""
    if unknown := [name for name in given.drill if name not in DRILLS]:
        raise UserError("drill", unknown[0], f"one of {', '.join(DRILLS)}")
    if given.times < 1:
        raise UserError("--times", given.times, "1 or more")
    if given.keep is None:
        return Path(tempfile.mkdtemp(prefix="flame-drills-"))
    try:
        given.keep.mkdir(parents=True, exist_ok=True)
        if found := next(given.keep.iterdir(), None):  # a baseline in there may be another job's
            raise UserError("--keep", f"{found}, which exists already", "a new or an empty folder")
    except OSError as error:
        raise UserError("--keep", hint=str(error)) from None
    return given.keep


def main(argv: list[str]) -> int:
    """Run the drills and print their checks."""
    given = parse(argv)
    try:
        root = make_folder(given)
    except UserError as error:
        print(f"flame: {error}", file=sys.stderr)
        return REFUSED
    failed = 0
    for name in given.drill or DRILLS:
        drill, begin = DRILLS[name], time.monotonic()
        print(f"{name}: {drill.__doc__}", flush=True)
        if drill is kill_in_save:
            drill = functools.partial(kill_in_save, times=given.times)
        try:
            for claim, holds, found in drill(root / name, given.nproc, given.flags):
                failed += not holds
                print(f"  {'ok    ' if holds else 'FAILED'}  {claim}" + ("" if holds else f": {found}"), flush=True)
        except (RuntimeError, OSError) as error:
            print(f"flame: {name}: {error}", file=sys.stderr)
            return 1 if failed else REFUSED
        except KeyboardInterrupt:
            print(f"flame: {name}: interrupted; the runs are in {root}", file=sys.stderr)
            return INTERRUPTED
        print(f"  {time.monotonic() - begin:.0f} s", flush=True)
    if failed:
        print(f"{failed} failed; the runs are in {root}")
    elif given.keep is None:
        shutil.rmtree(root)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
