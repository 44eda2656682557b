"""What train.sh runs before it starts any process: `python -m flame.preflight "$@"`.

Prints the --help page, rejects a job with one line, or says that its run is complete, in well under a second: it loads
neither torch nor the package torchtitan, only torchtitan's config module.
"""

import logging
import os
import signal
import sys
from pathlib import Path

from flame.config.without_torch import without_torch
from flame.errors import REFUSED, UserError
from flame.runtime import log

ANSWERED = 64  # exit code: there is nothing to launch
DRY_RUN = 65  # exit code: a dry run, for which train.sh starts one process


def main(argv: list[str]) -> int:
    """Exit code for a command line: 0 fine, ANSWERED, DRY_RUN, or REFUSED with one line on stderr. Writes no file."""
    with without_torch():
        from flame.config.parser import help_text, parse, world_size
        from flame.preflight.finished import describe_finished
        from flame.preflight.inputs import check_hub, check_wandb
        from flame.preflight.validate import check
        from flame.runtime.launch import check_port
        from flame.runtime.lock import check_free
    if "-h" in argv or "--help" in argv:
        try:
            print(help_text(), end="", flush=True)
        except BrokenPipeError:  # `train.sh -h | head`; Python would fail again when it closes stdout
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ANSWERED
    logging.getLogger("flame").setLevel(logging.ERROR)  # the run itself logs what it ignores
    try:
        config = parse(argv)
        check(config, world_size())
        if not config.job.dry_run:
            check_free(Path(config.job.dump_folder))
            check_port()
            check_hub(config)
            check_wandb(config)
            if finished := describe_finished(config):
                log.configure()
                for text in finished:
                    logging.info(text)
                return ANSWERED
    except UserError as e:
        print(f"flame: {e}", file=sys.stderr)
        return REFUSED
    return DRY_RUN if config.job.dry_run else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it, and train.sh with it, without a traceback
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # train.sh blocks it
    sys.exit(main(sys.argv[1:]))
