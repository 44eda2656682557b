"""Starts on two gloo ranks, one of which is late or cannot read a file: python waiting.py FOLDER"""

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from flame.checkpoint.commit import write_marker
from flame.checkpoint.metadata import METADATA
from flame.errors import UserError
from tests.checkpoint.empty import empty_file
from tests.checkpoint.managed import Job

TIMEOUT, LATE = 4, 6  # seconds


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")  # at once: another rank prints too
    sys.stdout.flush()


def _work(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT)
    )
    Job(folder).run(4)
    job = Job(folder)
    if rank == 1:
        time.sleep(LATE)
    listed: list[str] = []
    sys.addaudithook(lambda event, args: listed.append(str(args[0])) if event == "os.scandir" else None)
    job.manager.load()
    _print(f"rank {rank} resumes step {job.trainer.step}")
    _print(f"rank {rank} lists the checkpoints: {str(folder / 'checkpoint') in listed}")
    broken = folder / "checkpoint" / "step-6"
    if rank == 0:
        broken.mkdir()
        (broken / "b").symlink_to("/proc/self/mem")  # its size is 0, and reading it is an I/O error
        (broken / METADATA).touch()
        write_marker(broken, map(empty_file, (METADATA, "b")), {"resumable": True})
    dist.barrier()
    job = Job(folder)
    try:
        job.manager.load()
        _print(f"rank {rank} resumes step {job.trainer.step}")
    except UserError as error:
        _print(f"rank {rank}: {error}")
    dist.barrier()
    if rank == 0:
        (broken / "complete.json").unlink()
        (broken.parent / "replaced").write_text("a user's file in the way of the archive")
    dist.barrier()
    job = Job(folder, load_step=2)
    try:
        job.manager.load(2)
        job.manager.consensus.first(job.manager.archive_replaced)
    except UserError as error:
        _print(f"rank {rank}: {error}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(_work, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
