"""What flame's own collectives and its survey of checkpoints cost as ranks grow: python scripts/benchmark/ranks.py

Starts 1, 2, 4, ... processes on this machine, which take part in what all ranks of a job do together, over gloo. Prints
the median wall time of a call and the CPU time that it takes each rank, and what one rank reads at the start of a run
whose checkpoints have a file of each rank. Ranks above the number of cores wait for each other's turn: their wall time
is an upper bound, their CPU time is what a rank of a larger machine pays.
"""

import os
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's flame

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

from flame.checkpoint.commit import MARKER, SavedFile, scan_checkpoints, write_marker  # noqa: E402
from flame.checkpoint.metadata import METADATA  # noqa: E402
from flame.runtime.consensus import RankConsensus  # noqa: E402
from flame.training.outcome import Agreement  # noqa: E402

HOUR = timedelta(hours=1)
REPEATS = 200


def measure(call: Callable[[], Any]) -> tuple[float, float]:
    """The median wall ms of a call and its mean CPU ms on this rank, all threads."""
    walls, cpu = [], time.process_time()
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        walls.append(time.perf_counter() - start)
    return 1e3 * statistics.median(walls), 1e3 * (time.process_time() - cpu) / REPEATS


def run_rank(rank: int, world_size: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=HOUR)
    start, cpu = time.perf_counter(), time.process_time()
    consensus = RankConsensus(HOUR, HOUR)
    consensus.max(0)
    connect = 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - cpu)
    loss, norm, sums = torch.tensor(2.5), torch.tensor(1.0), torch.zeros(3, dtype=torch.int64)

    def agree() -> None:
        Agreement(loss, norm, sums, exhausted=False, asked=0, due=False).wait()

    found = {
        "connect (once)": connect,
        "a step's outcome": measure(agree),
        "a flag of all ranks": measure(lambda: consensus.max(rank)),
        "an answer of rank 0": measure(lambda: consensus.first(lambda: "step-1000")),
        "a row that each rank names": measure(lambda: consensus.gather({"source": [f"file {rank}"]})),
    }
    dist.barrier()
    if rank == 0:
        results.update(found)
    dist.destroy_process_group()


def survey(folder: Path, ranks: int, checkpoints: int = 10) -> tuple[float, int]:
    """Wall ms of the first rank's survey of checkpoints with a file of each rank, and the bytes of a marker."""
    for step in range(1, checkpoints + 1):
        path = folder / f"step-{step}"
        path.mkdir()
        names = [METADATA, *(f"__{rank}_0.distcp" for rank in range(ranks))]
        for name in names:
            (path / name).write_bytes(b"1")
        write_marker(path, [SavedFile(name, 1, "0" * 32) for name in names], {"resumable": True, "step": step})
    start = time.perf_counter()
    assert not any(status.corruption for status in scan_checkpoints(folder).values())
    return 1e3 * (time.perf_counter() - start), (path / MARKER).stat().st_size


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--files", type=int, nargs="+", default=[8, 64, 1024])
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    table: dict[str, list[str]] = {}
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
            results: Any = manager.dict()
            mp.spawn(run_rank, (ranks, f"{folder}/store", results), nprocs=ranks)
            for name, (wall, cpu) in results.items():
                table.setdefault(name, []).append(f"{wall:.2f} ({cpu:.2f})")
    print("wall ms (CPU ms of a rank)", *(f"{ranks} ranks" for ranks in arguments.ranks), sep=" | ")
    for name, cells in table.items():
        print(name, *cells, sep=" | ")
    for files in arguments.files:
        with tempfile.TemporaryDirectory() as folder:
            wall, size = survey(Path(folder), files)
        print(f"survey of 10 checkpoints of {files:,} files: {wall:.1f} ms; a marker has {size:,} bytes")


if __name__ == "__main__":
    main()
