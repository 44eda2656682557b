"""What train.sh asks before it starts any process: `python -m flame.preflight "$@"`.

Prints the --help page, or refuses a mistake with one line, in well under a second: it loads neither torch nor the
package torchtitan, only torchtitan's config module.
"""

import contextlib
import importlib.util
import logging
import os
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path

from flame.errors import REFUSED, UserError

HELP_SHOWN = 64  # exit code that tells train.sh that all went well and there is nothing to launch
DRY_RUN = 65  # exit code that tells train.sh that one process is enough


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """Stand-ins for torch and the packages torchtitan and torchtitan.config, while config modules are imported.

    torchtitan/__init__ imports quantization and with it inductor (3 to 4 s), while torchtitan/config/job_config.py
    needs of torch only the name. A package object that has nothing but __path__ lets its modules be found without
    running its __init__. Whatever is already loaded stays, and no stand-in outlives the block.
    """
    titan = importlib.util.find_spec("torchtitan")
    assert titan is not None and titan.submodule_search_locations, "torchtitan is not installed"
    root = Path(titan.submodule_search_locations[0])
    paths: dict[str, list[str]] = {"torch": [], "torchtitan": [str(root)], "torchtitan.config": [str(root / "config")]}
    added = [name for name in paths if name not in sys.modules]
    for name in added:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = paths[name]
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def main(argv: list[str]) -> int:
    """Exit code for a command line: 0 fine, HELP_SHOWN, DRY_RUN, or REFUSED with one line on stderr. Writes no file."""
    with without_torch():
        from flame.config.parser import help_text, parse, world_size
        from flame.preflight.validate import check
        from flame.runtime.lock import check_free
    if "-h" in argv or "--help" in argv:
        try:
            print(help_text(), end="", flush=True)
        except BrokenPipeError:  # `train.sh -h | head`; Python would complain again when it closes stdout
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return HELP_SHOWN
    logging.getLogger("flame").setLevel(logging.ERROR)  # the run itself says what it ignores
    try:
        config = parse(argv)
        check(config, world_size())
        if not config.job.dry_run:
            check_free(Path(config.job.dump_folder))
    except UserError as e:
        print(f"flame: {e}", file=sys.stderr)
        return REFUSED
    return DRY_RUN if config.job.dry_run else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it, and train.sh with it, without a traceback
    sys.exit(main(sys.argv[1:]))
