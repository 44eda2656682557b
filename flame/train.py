"""Trains one job: parse the flags, choose the device, register the model, run. Started by torchrun; see train.sh."""

import os
import sys
import traceback
from contextlib import nullcontext
from pkgutil import resolve_name

from flame.errors import FAILED, REFUSED, NonFiniteError, SaveError, UserError
from flame.runtime.stop import LAUNCHED, Signals, end_at_once, leave


def main(argv: list[str], trainer: str = "flame.training.trainer:FlameTrainer") -> int:
    """Run the job that `argv` describes on this rank, with the class that `trainer` names; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        from flame.preflight.__main__ import main as preflight

        preflight(argv)
        return 0
    signals = Signals(leave, end_at_once)
    signals.listen()  # before the seconds that imports take
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        return record(train)(argv, signals, trainer)  # type: ignore[return-value]
    except Exception:
        # flame's launcher shows the one traceback that matters; torch's hook would put the rank before each line
        if not (LAUNCHED in os.environ and os.path.isfile(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))):
            traceback.print_exc()
        return 1


def train(argv: list[str], signals: Signals, trainer: str) -> int:
    """What `main` does after it listens to signals."""
    from flame.runtime import device, imports, log

    log.configure()
    device.choose()  # before the imports below, which import torchtitan, which reads the device
    with imports.on_demand():
        from flame.config.parser import parse, world_size
        from flame.preflight.validate import check
        from flame.runtime.lock import hold
        from flame.training.context import RunContext
        from flame.training.job import run_job
        from flame.training.train_spec import register

    try:
        config = parse(argv)
        if config.job.dry_run:
            raise UserError("--job.dry_run", "true", "false in a rank", "train.sh starts python -m flame.dry_run")
        context = RunContext(config, signals)
        check(config, world_size(), is_first=context.is_first)
        with hold(context.run.folder) if context.is_first else nullcontext():
            register(config, context)
            return run_job(resolve_name(trainer), context)
    except UserError as error:
        print(f"flame: {error}", file=sys.stderr)
        return REFUSED
    except (NonFiniteError, SaveError) as error:
        print(f"flame: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
