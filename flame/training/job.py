"""One job from start to export: what surrounds the training loop, and what happens when it fails."""

import signal
from functools import partial

import torch.distributed as dist
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_module

from flame.checkpoint.commit import complete_steps
from flame.checkpoint.structure import ConversionError
from flame.config.paths import command
from flame.convert.dcp_file import CorruptedError
from flame.convert.verify import export_and_verify
from flame.errors import EXHAUSTED, PREEMPTED, SaveError, UserError
from flame.runtime import stop
from flame.training.context import RunContext
from flame.training.trainer import FlameTrainer


def run_job(trainer_class: type[FlameTrainer], context: RunContext) -> int:
    """Train the job from its start or a checkpoint to the end, close everything in order, and export the result.

    Returns the exit code: 0, PREEMPTED, or, if the data ended before the last step and data.exhausted_exit_code
    is 1, EXHAUSTED on the rank that writes.
    """
    trainer, job_config, signals = None, context.job_config, context.signals
    signals.first = stop.note  # from here on other ranks may wait for this one: all end together or none
    try:
        trainer = trainer_class(job_config, context)
        signals.again = partial(_abandon, trainer)
        if job_config.training.context_len is not None and not job_config.training.varlen:
            logger.warning("--training.context_len has no effect: it cuts documents that --training.varlen keeps apart")
        if job_config.checkpoint.create_seed_checkpoint:
            trainer.start()
            trainer.checkpointer.save(curr_step=0, last_step=True)
            trainer.run.set_status("completed", reason="seed checkpoint")
        else:
            trainer.train()
    except BaseException as error:
        if trainer is not None:
            if trainer.started:
                trainer.run.set_status("failed", reason=f"{type(error).__name__}: {error}")
            trainer.close()
        raise
    trainer.close()
    if trainer.stopped:
        stop.ignore()  # torchrun sends SIGTERM to the ranks that end a moment after the first
    # gloo aborts now and then when a rank destroys the group while another still uses it
    dist.barrier(device_ids=[device_module.current_device()])
    dist.destroy_process_group()
    if not trainer.stopped and trainer.run.writes:
        try:
            _finish(trainer, signals)
        except stop.Stopped as stopped:
            trainer.stopped = str(stopped)
            trainer.run.set_status("preempted", reason=f"{stopped}, before the export was done")
        except (OSError, UserError, CorruptedError, ConversionError) as error:
            reason = f"step {trainer.step} is saved, but was not exported: {error}"
            trainer.run.set_status("failed", reason=reason)
            raise SaveError(f"{reason}; the same command tries again") from None
    if trainer.stopped:
        _log_stopped(trainer)
        return PREEMPTED
    # One rank returns it: torchrun ends all others as soon as one fails, and that one may still be exporting.
    failed = trainer.exhausted and job_config.data.exhausted_exit_code and trainer.run.writes
    return EXHAUSTED if failed else 0


def _abandon(trainer: FlameTrainer, number: int) -> None:
    if trainer.started:
        trainer.run.set_status("failed", reason=f"a second signal, {signal.Signals(number).name}: stopped at once")
    stop.end_at_once(number)


def _log_stopped(trainer: FlameTrainer) -> None:
    run, step, config = trainer.run, trainer.step, trainer.job_config.checkpoint
    if not run.writes:
        return
    if not trainer.started:
        logger.info(f"stopped by {trainer.stopped} before training began; the same command starts it again")
        return
    saved = [s for s in complete_steps(run.folder / config.folder) if s <= step] if config.enable else []
    last = f"the last checkpoint is {run.folder / config.folder}/step-{saved[-1]}" if saved else "nothing is saved"
    reason = run.read_status()["reason"]
    go_on = command("train.sh", "--job.config_file", run.folder / "config.toml")
    logger.info(f"preempted at step {step} ({reason}), {last}; go on: {go_on}")


def _finish(trainer: FlameTrainer, signals: stop.Signals) -> None:
    """Export the last step's checkpoint and log where everything is; the rank that writes calls it.

    The process group is gone: no rank waits in a collective and no timeout runs, however long it takes.
    Raises Stopped at a signal before the export is whole.
    """
    run, config, step = trainer.run, trainer.job_config.checkpoint, trainer.step
    steps = complete_steps(run.folder / config.folder) if config.enable else []
    checkpoint = run.folder / config.folder / f"step-{step}" if step in steps else None
    export = run.folder / "hf" / f"step-{step}" if checkpoint and config.export else None
    if checkpoint and export:
        export.parent.mkdir(exist_ok=True)
        signals.first = stop.interrupt
        if signals.asked:  # since the last step began
            stop.interrupt(signals.asked)
        export_and_verify(checkpoint, run.folder / "model", export, config.export_dtype)
        signals.first = stop.note
    logger.info(run.describe_end(step, checkpoint, export, max((s for s in steps if s > step), default=None)))
