"""A step of flame beside torchtitan's train_step and a bare loop, on a CPU: python scripts/benchmark/step.py

All three train the same llama3 of torchtitan, in one process, a step of each in turn. A step is what its loop does for
it: batch, forward, backward, clipping, AdamW, schedule, and, but for the bare loop, collecting garbage and asking
whether a save is due. Prints the median CPU time of a step, and quartiles of what it is more than the bare loop's
beside it. The bare loop and torchtitan are given one batch again and again, flame reads text.
"""

import copy
import os
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's flame
WARM_UP = 100  # steps; the first row of each of the 64 lanes reads and tokenizes a block of documents

from flame.runtime import device, log  # noqa: E402

device.choose()  # before torchtitan is imported

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.config import ConfigManager  # noqa: E402
from torchtitan.protocols import train_spec  # noqa: E402
from torchtitan.train import Trainer  # noqa: E402


class Rows(BaseDataLoader):
    """One batch again and again."""

    def __init__(self, batch_size: int, seq_len: int) -> None:
        tokens = torch.randint(256, (batch_size, seq_len + 1), generator=torch.Generator().manual_seed(0))
        self.batch = {"input": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield dict(self.batch[0]), self.batch[1]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def flags(folder: str, batch_size: int, seq_len: int, **more: object) -> list[str]:
    own = {
        "model.name": "llama3", "model.flavor": "debugmodel", "job.dump_folder": folder, "metrics.log_freq": 10**9,
        "training.steps": 10**9, "training.seq_len": seq_len, "training.local_batch_size": batch_size,
        "lr_scheduler.warmup_steps": 10, "training.mixed_precision_param": "float32",
        "activation_checkpoint.mode": "none", **more,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in own.items()]


def of_flame(folder: str, batch_size: int, seq_len: int) -> Callable[[], None]:
    from flame.config.parser import parse
    from flame.training.context import RunContext
    from flame.training.train_spec import register
    from flame.training.trainer import FlameTrainer

    own = {"training.dataloader.num_workers": 0}  # whose time is then a step's
    config = parse([*flags(folder, batch_size, seq_len, **own), "--checkpoint.no_enable"])
    context = RunContext(config)
    register(config, context)
    trainer = FlameTrainer(config, context)
    trainer.start()
    trainer.accounting.begin()
    return stepping(trainer)


def of_torchtitan(folder: str, batch_size: int, seq_len: int) -> tuple[Trainer, Callable[[], None]]:
    spec = replace(
        train_spec.get_train_spec("llama3"),
        build_dataloader_fn=lambda **_: Rows(batch_size, seq_len),
        build_tokenizer_fn=None,
        state_dict_adapter=None,
    )
    train_spec.register_train_spec("timed", spec)
    trainer = Trainer(ConfigManager().parse_args(flags(folder, batch_size, seq_len, **{"model.name": "timed"})))
    return trainer, stepping(trainer)


def stepping(trainer: Any) -> Callable[[], None]:
    batches = trainer.batch_generator(trainer.dataloader)

    def step() -> None:
        trainer.step += 1
        trainer.gc_handler.run(trainer.step)
        trainer.train_step(batches)
        trainer.checkpointer.save(trainer.step, last_step=False)

    return step


def of_nobody(model: torch.nn.Module, batch_size: int, seq_len: int) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-4, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    batches = iter(Rows(batch_size, seq_len))

    def step() -> None:
        optimizer.zero_grad()
        inputs, labels = next(batches)
        loss = F.cross_entropy(model(inputs["input"]).flatten(0, 1).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        schedule.step()

    return step


def milliseconds(step: Callable[[], None]) -> float:
    begin = time.process_time()
    step()
    return 1e3 * (time.process_time() - begin)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--seq_len", type=int, default=16)
    options = parser.parse_args()
    shape = options.batch_size, options.seq_len
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    with tempfile.TemporaryDirectory() as folder:
        log.configure()
        trainer, torchtitan = of_torchtitan(f"{folder}/torchtitan", *shape)  # before flame gives it its manager
        bare = of_nobody(copy.deepcopy(trainer.model_parts[0]), *shape)
        loops = {"bare": bare, "torchtitan": torchtitan, "flame": of_flame(f"{folder}/flame", *shape)}
        turns = [{name: milliseconds(step) for name, step in loops.items()} for _ in range(WARM_UP + options.steps)]
    turns = turns[WARM_UP:]
    print(f"{options.batch_size} x {options.seq_len} tokens, CPU ms a step, {options.steps} steps")
    for name in loops:
        low, middle, high = statistics.quantiles((turn[name] - turn["bare"] for turn in turns), n=4)
        own = statistics.median(turn[name] for turn in turns)
        ratio = statistics.median(turn[name] / turn["bare"] for turn in turns)
        print(f"{name:12}{own:8.2f}   {middle:+.2f} ({low:+.2f} to {high:+.2f}) over bare, x{ratio:.3f}")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # not past the threads of the process group
