"""Trains one job: parse the flags, choose the device, register the model, run. Started by torchrun; see train.sh."""

import sys

from torch.distributed.elastic.multiprocessing.errors import record

from flame import device, log
from flame.errors import UserError


@record  # so that torchrun shows the traceback of a rank whose output LOG_RANK hides
def main(argv: list[str]) -> int:
    """Run the job that `argv` describes on this rank; returns the exit code."""
    log.configure()
    device.choose()  # before the imports below, which import torchtitan, which reads the device
    from flame.config import parse, world_size
    from flame.dry_run import describe
    from flame.job import run_job
    from flame.plan import check
    from flame.spec import register
    from flame.trainer import FlameTrainer, NonFiniteError

    try:
        config = parse(argv)
        check(config, world_size())
        if config.job.dry_run:
            print(describe(config, world_size()))
            return 0
        register(config)
        return run_job(FlameTrainer, config)
    except UserError as error:
        print(f"flame: {error}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"flame: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
