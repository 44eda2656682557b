"""One job from its start to its export: what happens around the training loop, and when something goes wrong in it."""

import shlex
from typing import Any

import torch.distributed as dist
from torchtitan.tools.logging import logger

from flame.checkpoint.manager import complete_steps
from flame.trainer import FlameTrainer
from flame.verify import export_proven


def run_job(trainer_class: type[FlameTrainer], job_config: Any) -> int:
    """Train `job_config` from start or checkpoint to the end, close everything in order, and export the result.

    Returns the exit code: 0, or data.exhausted_exit_code if the data ended before the last step.
    """
    trainer = None
    try:
        trainer = trainer_class(job_config)
        _say_ignored(job_config)
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
    dist.barrier()  # gloo aborts now and then when a rank destroys the group while another still uses it
    dist.destroy_process_group()
    _finish(trainer)
    return job_config.data.exhausted_exit_code if trainer.exhausted else 0


def _say_ignored(job_config: Any) -> None:
    """Say which settings were given and have no effect."""
    if job_config.training.context_len is not None and not job_config.training.varlen:
        logger.warning("--training.context_len has no effect: it cuts documents that --training.varlen keeps apart")


def _finish(trainer: FlameTrainer) -> None:
    """Export the last step's checkpoint and say where everything is, on the rank that writes.

    There is no process group any more: no rank waits at a collective and no timeout runs, however long it takes.
    """
    run, config, step = trainer.run, trainer.job_config.checkpoint, trainer.step
    if not run.writes:
        return
    steps = complete_steps(run.folder / config.folder) if config.enable else []
    lines = [f"metrics      {run.folder / 'metrics.jsonl'}"]
    if step in steps:
        checkpoint = run.folder / config.folder / f"step-{step}"
        lines.append(f"checkpoint   {checkpoint}")
        if config.export:
            export = run.folder / "hf" / f"step-{step}"
            export.parent.mkdir(exist_ok=True)
            export_proven(checkpoint, run.folder / "model", export, config.export_dtype)
            lines.append(f"model        {export}  (Hugging Face format)")
    if later := [other for other in steps if other > step]:
        lines.append(f"note         step {later[-1]} is there as well, and is what a resume takes")
    recorded = shlex.quote(str(run.folder / "config.toml"))
    lines.append(f"go on        bash train.sh --job.config_file {recorded} --training.steps N")
    logger.info("\n  ".join([f"{run.read_status()['status']} at step {step}", *lines]))
