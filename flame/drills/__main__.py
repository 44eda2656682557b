"""`python -m flame.drills [NAME ...] [--nproc N] [--keep FOLDER] [--flags FLAGS ...]`.

Exit code: 0, 1 if a claim does not hold, 2 for a mistake, 130 after Ctrl-C.
"""

import argparse
import functools
import shutil
import sys
import tempfile
import time
from pathlib import Path

from flame.drills.drill import DRILLS, kill_in_save
from flame.errors import INTERRUPTED


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text}, must be 1 or more")
    return int(text)


def _name(text: str) -> str:
    if text not in DRILLS:
        raise argparse.ArgumentTypeError(f"found {text}, must be one of {', '.join(DRILLS)}")
    return text


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; argparse exits with code 2 for what it does not know."""
    lines = [f"  {name:<14}{drill.__doc__}" for name, drill in DRILLS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m flame.drills",
        description="Make a tiny job fail on purpose, and see that nothing is lost. Drills:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("drill", nargs="*", type=_name, help="which; default: all")
    parser.add_argument("--nproc", type=int, default=2, choices=[1, 2, 4, 8], help="ranks, on this machine (2)")
    parser.add_argument("--times", type=_count, default=3, help="kills of kill_in_save (3)")
    parser.add_argument("--keep", type=Path, help="folder for the runs, kept; default: a temporary one")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="all that follows is added to the jobs")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Run the drills and print what is found."""
    given = parse(argv)
    root = Path(tempfile.mkdtemp(prefix="flame-drills-")) if given.keep is None else given.keep
    try:
        root.mkdir(parents=True, exist_ok=True)
        there = next(root.iterdir(), None)
    except OSError as error:
        print(f"flame: --keep: {error}", file=sys.stderr)
        return 2
    if there:  # a run that drills compare with may be another job's
        print(f"flame: --keep: {there} exists already; name a folder that is empty or not there", file=sys.stderr)
        return 2
    failed = 0
    for name in given.drill or DRILLS:
        folder = root / name
        drill, begin = DRILLS[name], time.monotonic()
        print(f"{name}: {drill.__doc__}", flush=True)
        if drill is kill_in_save:
            drill = functools.partial(kill_in_save, times=given.times)
        try:
            for claim, holds, found in drill(folder, given.nproc, given.flags):
                failed += not holds
                print(f"  {'ok    ' if holds else 'FAILED'}  {claim}" + ("" if holds else f": {found}"), flush=True)
        except (RuntimeError, OSError) as error:
            print(f"flame: {name}: {error}", file=sys.stderr)
            return 1 if failed else 2
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
