"""The tiny job of the drills: started by the launcher that starts every job, watched, signalled and killed."""

import atexit
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flame.drills.moment import Moment, stop_at

STEPS, INTERVAL, FAULT_STEP, GLOBAL_BATCH = 12, 3, 5, 8
STALL_SECONDS = 4.0
TIMEOUT_SECONDS = 600  # of a job
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
MODEL: dict[str, Any] = {"model_type": "llama", **SIZES, "vocab_size": 320}


class DrillJob:
    """A run in `folder` with the tiny model and `world_size` processes on this machine; `flags` come last and win."""

    process: subprocess.Popen  # the launcher, once started

    def __init__(self, folder: Path, world_size: int, *flags: str) -> None:
        self.folder, self.world_size = folder, world_size
        self.checkpoints, self.log = folder / "checkpoint", folder.with_suffix(".log")  # log: the ranks' output
        self.pids = folder.with_suffix(".pids")  # where every rank leaves an empty file, named by its process id
        self.reached = folder.with_suffix(
            ".reached"
        )  # a file that is there when the first rank has stopped to be killed
        self.flags = flags

    def start(self, trainer: str = "FlameTrainer", *flags: str, moment: Moment | None = None) -> None:
        """Launch the ranks, with a trainer of flame.drills.fault; the first one stops at a moment if it is given."""
        inputs = write_inputs(self.folder.parent)
        self.pids.mkdir(exist_ok=True, parents=True)
        self.reached.unlink(missing_ok=True)
        torchrun = (
            "--nproc_per_node",
            str(self.world_size),
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "localhost:0",
        )
        command = [
            *(sys.executable, "-m", "flame.runtime.launch", *(torchrun if self.world_size > 1 else ())),
            *("-m", "flame.drills.job"),
            *(str(self.pids), trainer, str(self.reached), json.dumps(moment)),
            *(f"--job.dump_folder={self.folder}", f"--checkpoint.interval={INTERVAL}", "--checkpoint.no_export"),
            *(f"--model.config={inputs / 'model.json'}", f"--training.dataset={inputs / 'text.jsonl'}"),
            *(f"--training.steps={STEPS}", f"--training.local_batch_size={GLOBAL_BATCH // self.world_size}"),
            *("--training.seq_len=128", "--training.mixed_precision_param=float32"),
            *("--lr_scheduler.warmup_steps=2", "--metrics.log_freq=1"),
            "--debug.deterministic",  # on GPUs: trajectories are compared to the last digit
            *(*self.flags, *flags),
        ]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        environment.pop("WORLD_SIZE", None)
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        atexit.register(self.close)

    def wait(self) -> int:
        """The launcher's exit code. Raises RuntimeError if the job hangs, after killing it."""
        try:
            return self.process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"a job was still running after {TIMEOUT_SECONDS} s; see {self.log}") from None

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Poll a condition every few milliseconds; False if the job ends before it holds."""
        while not condition():
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        return True

    def close(self) -> None:
        """End the job if it is still running, as after Ctrl-C, which does not reach it."""
        if self.process.poll() is None:
            self.process.terminate()  # the launcher passes it on to all ranks
            try:
                self.process.wait(10)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                self.kill()

    def kill(self) -> None:
        """SIGKILL the launcher and every rank, and wait until they are gone."""
        self.process.kill()
        self.process.wait()
        for path in self.pids.iterdir():
            with suppress(ProcessLookupError):
                os.kill(int(path.name), signal.SIGKILL)
            while is_alive(int(path.name)):
                time.sleep(0.002)
            path.unlink()

    def records(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, without one that is still being written."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def last_step(self) -> int:
        """The last step in metrics.jsonl, 0 before the first."""
        return max((record["step"] for record in self.records()), default=0)

    def status(self) -> dict[str, Any]:
        path = self.folder / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def last_line(self) -> str:
        """The last line of the output that has a word in it."""
        lines = reversed(self.log.read_text().splitlines())
        return next((line.strip() for line in lines if re.search(r"\w", line)), "no output")


def trajectory(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What must not depend on how a run came about: step, loss, gradient norm, learning rate, tokens and data."""
    names = ("step", "loss", "grad_norm", "lr", "tokens", "data_digest")
    return [tuple(record[name] for name in names) for record in records]


def write_inputs(folder: Path) -> Path:
    """Write the model and the text of the drills, once per folder; returns where."""
    inputs = folder / "inputs"
    if not (inputs / "text.jsonl").exists():
        inputs.mkdir(parents=True, exist_ok=True)
        (inputs / "model.json").write_text(json.dumps(MODEL))
        draw = random.Random(0)
        rows = (" ".join(f"{draw.randrange(1000)}" for _ in range(draw.randrange(20, 400))) for _ in range(600))
        (inputs / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return inputs


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not, as its files are closed."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        os.kill(pid, 0)
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


if __name__ == "__main__":  # a rank of the job: its folder of process ids, its trainer, its moment, its flags
    from flame.train import main

    if len(sys.argv) < 5:
        sys.exit("flame: flame.sh drills starts this")
    pids, trainer, reached, moment, *argv = sys.argv[1:]
    Path(pids, str(os.getpid())).touch()
    if os.environ["RANK"] == "0" and (fields := json.loads(moment)):
        stop_at(Moment(*fields), Path(reached))
    sys.exit(main(argv, f"flame.drills.fault:{trainer}"))
