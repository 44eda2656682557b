"""Writes one set of tensors as checkpoints of 1, 2 and 4 gloo ranks in several layouts: python sharded.py FOLDER"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

SHAPES = {"even": (8, 6), "uneven": (5, 7), "short": (1, 9), "cube": (3, 4, 5), "row": (11,), "wide": (2, 64)}


def tensors() -> dict[str, torch.Tensor]:
    """What every checkpoint holds, whoever writes it."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def network() -> torch.nn.Module:
    """A module for FSDP2, with sizes that 4 ranks cannot share evenly."""
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Embedding(13, 6), torch.nn.Linear(6, 10), torch.nn.Linear(10, 3))


def _work(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    for ranks in (1, 2, 4):
        group = dist.new_group(list(range(ranks)))
        line = torch.distributed.DeviceMesh("cpu", list(range(ranks)))
        if rank >= ranks:
            continue
        for dim in (0, 1):
            state = {name: distribute_tensor(t, line, [Shard(min(dim, t.dim() - 1))]) for name, t in tensors().items()}
            dcp.save(state, checkpoint_id=str(folder / f"shard{dim}-{ranks}"), process_group=group)
        module = fully_shard(network(), mesh=line)
        rest = {"optimizer": {"state.0.weight.exp_avg": torch.ones(3)}, "train_state": {"step": 3}}
        dcp.save({**module.state_dict(), **rest}, checkpoint_id=str(folder / f"fsdp-{ranks}"), process_group=group)
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {"1": ColwiseParallel(), "2": RowwiseParallel()}
    module = fully_shard(parallelize_module(network(), square["tp"], plan), mesh=square["dp"])
    dcp.save(module.state_dict(), checkpoint_id=str(folder / "fsdp-over-tp"))
    layouts = {"both": [Shard(0), Shard(1)], "tp-replicated": [Replicate(), Shard(0)], "twice": [Shard(0), Shard(0)]}
    for name, layout in layouts.items():
        state = {
            key: distribute_tensor(t, square, [Shard(min(p.dim, t.dim() - 1)) if p.is_shard() else p for p in layout])
            for key, t in tensors().items()
        }
        dcp.save(state, checkpoint_id=str(folder / name))
    future = dcp.async_save(state, checkpoint_id=str(folder / "async"))
    getattr(future, "upload_completion", future).result()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    torch.multiprocessing.start_processes(_work, (Path(sys.argv[1]),), nprocs=4, start_method="fork")
