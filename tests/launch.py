"""Starts real training runs for tests: one launch by torchrun, or several runs in the processes of one launch."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flame.drills import job as drill_job

REPO = Path(__file__).parents[1]
SMALL = (  # flags that make any run small, deterministic and fully logged
    "--training.seq_len=128",
    "--training.local_batch_size=8",
    "--training.mixed_precision_param=float32",
    "--lr_scheduler.warmup_steps=2",
    "--metrics.log_freq=1",
)


def torchrun(*command: str, ranks: int = 1) -> list[str]:
    """The command line that starts `command` (after `python`) on `ranks` local ranks."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"),
        *(f"--nproc_per_node={ranks}", *command),
    ]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with the repository importable."""
    return {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", **changes}


def train(*flags: str, ranks: int = 1, **env: str) -> "subprocess.CompletedProcess[str]":
    """Run one job to its end."""
    command = torchrun("-m", "flame.train", *flags, ranks=ranks)
    return subprocess.run(command, env=environment(**env), capture_output=True, text=True, timeout=300)


def train_each(
    jobs: Sequence[Sequence[str]], ranks: int = 1, trainer: str = "flame.training.trainer:FlameTrainer", **env: str
) -> str:
    """Run several jobs one after the other in one launch, which pays for the imports once; returns the log."""
    command = torchrun("-m", "tests.launch", trainer, json.dumps([list(job) for job in jobs]), ranks=ranks)
    done = subprocess.run(command, env=environment(**env), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]  # warnings come first
    return done.stdout


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trajectory(folder: Path) -> list[tuple[Any, ...]]:
    """What must not depend on how a run came about, of each step."""
    return drill_job.trajectory(metrics(folder))


def _run_jobs(trainer: str, jobs: list[list[str]]) -> None:
    from flame.runtime import device, log

    log.configure()
    device.choose()
    import torch
    import torch.distributed as dist
    from torchtitan.protocols import train_spec

    from flame.config.parser import parse, world_size
    from flame.preflight.validate import check
    from flame.training.context import RunContext
    from flame.training.train_spec import register

    module, _, name = trainer.partition(":")
    trainer_class = getattr(importlib.import_module(module), name)
    for flags in jobs:
        train_spec._extra_train_specs.clear()
        config = parse(flags)
        context = RunContext(config)
        check(config, world_size(), is_first=context.is_first)
        register(config, context)
        job = trainer_class(config, context)
        job.train()
        job.close()
        if config.compile.enable:
            torch.compiler.reset()  # else the graphs of all jobs count toward the limit of how many one code has
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # not past the threads that gloo has left of all the jobs' groups: that has aborted a process


if __name__ == "__main__":
    _run_jobs(sys.argv[1], json.loads(sys.argv[2]))
