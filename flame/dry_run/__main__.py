"""The process of a dry run, which train.sh starts: `python -m flame.dry_run FLAGS`. It computes nothing on a GPU."""

import signal
import sys

from flame.errors import REFUSED, UserError
from flame.runtime import device, imports, log


def main(argv: list[str]) -> int:
    """Print the page of the job that `argv` describes. Exit code: 0, or 2 with one line on stderr if it cannot run."""
    log.configure()
    with imports.on_demand():
        device.choose(cpu=True)  # before the imports below, which import torchtitan, which reads the device
        from flame.config.parser import parse, world_size
        from flame.dry_run.summary import summarize
        from flame.preflight.validate import check

    try:
        config = parse(argv)
        check(config, world_size())
        print(summarize(config, world_size()))
    except UserError as error:
        print(f"flame: {error}", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # train.sh blocks it
    sys.exit(main(sys.argv[1:]))
