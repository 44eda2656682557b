"""torchrun, but quiet about what a rank has already said: a mistake of the user's is one line and exit code 2."""

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

REFUSED = 2  # flame.train has printed its line


def launch(argv: list[str]) -> int:
    """Run torchrun with `argv`; returns the exit code, 2 when a rank refused its job."""
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        main(argv)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode == REFUSED:
            return REFUSED
        raise
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
