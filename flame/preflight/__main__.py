"""What train.sh runs before it starts any process: `python -m flame.preflight "$@"`.

Prints the --help page, or rejects a job with one line, in well under a second: it loads neither torch nor the package
torchtitan, only torchtitan's config module.
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

HELP_SHOWN = 64  # exit code: there is nothing to launch
DRY_RUN = 65  # exit code: a dry run, for which train.sh starts one process


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """In the block, stand-ins for torch, torchtitan and torchtitan.config, so that config modules can be imported.

    torchtitan/__init__ of 0.2.2 imports quantization and with it inductor (3 to 4 s), while torchtitan/config needs
    only the name of torch. The modules of a package that has nothing but __path__ are found without its __init__.
    Modules that are loaded already are left alone.
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
        except BrokenPipeError:  # `train.sh -h | head`; Python would fail again when it closes stdout
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return HELP_SHOWN
    logging.getLogger("flame").setLevel(logging.ERROR)  # the run itself logs what it ignores
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
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # train.sh blocks it
    sys.exit(main(sys.argv[1:]))
