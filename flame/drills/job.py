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
from pathlib import Path
from typing import Any

STEPS, INTERVAL, BATCH = 12, 3, 8
FAULT = 5  # step in which a fault comes
STALL = 4.0  # seconds
PATIENCE = 600  # seconds that a job may take
MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
}
PIDS = "pids"  # folder of a run in which every rank leaves an empty file, named by its process id


class Job:
    """A run in `folder` with the tiny model and `ranks` processes on this machine; `flags` come last and win."""

    def __init__(self, folder: Path, ranks: int, *flags: str) -> None:
        self.folder, self.ranks = folder, ranks
        inputs = write_inputs(folder.parent)
        self.flags = [
            f"--job.dump_folder={folder}",
            f"--model.config={inputs / 'model.json'}",
            f"--training.dataset={inputs / 'text.jsonl'}",
            f"--training.local_batch_size={BATCH // ranks}",
            "--training.seq_len=128",
            "--training.mixed_precision_param=float32",
            f"--training.steps={STEPS}",
            "--lr_scheduler.warmup_steps=2",
            "--metrics.log_freq=1",
            f"--checkpoint.interval={INTERVAL}",
            "--checkpoint.no_export",
            "--debug.deterministic",  # on GPUs: runs are compared to the last digit
            *flags,
        ]
        self.process: subprocess.Popen | None = None
        atexit.register(self.close)

    def start(self, fault: str = "FlameTrainer", *flags: str) -> None:
        """Launch the ranks; fault: a trainer of flame.drills.fault. Their output goes to `folder`.log."""
        command = [sys.executable, "-m", "flame.runtime.launch", "--nproc_per_node", str(self.ranks)]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", "flame.drills.rank"]
        pids = self.folder.with_suffix(f".{PIDS}")
        pids.mkdir(exist_ok=True, parents=True)
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [*command, str(pids), fault, *self.flags, *flags],
                env={name: value for name, value in environment.items() if name != "WORLD_SIZE"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def end(self) -> int:
        """Wait for the launcher; returns its exit code. Raises RuntimeError if the job hangs, and ends it."""
        assert self.process is not None
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"a job was still running after {PATIENCE} s; see {self.log}") from None

    def run(self, fault: str = "FlameTrainer", *flags: str) -> int:
        """Start and end."""
        self.start(fault, *flags)
        return self.end()

    def wait_for(self, happened: Callable[[], bool]) -> bool:
        """Look every few milliseconds until it happened, or the job has ended (False)."""
        assert self.process is not None
        while not happened():
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        return True

    def close(self) -> None:
        """End the job if it is still at work, as after Ctrl-C, which does not reach it."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()  # the launcher passes it on to all ranks
        try:
            self.process.wait(10)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self.kill()

    def kill(self) -> None:
        """SIGKILL to the launcher and every rank, and wait until they are gone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        for path in self.folder.with_suffix(f".{PIDS}").iterdir():
            pid = int(path.name)
            try:
                os.kill(pid, signal.SIGKILL)
                while _exists(pid):
                    time.sleep(0.002)
            except ProcessLookupError:
                pass
            path.unlink()

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoint"

    def records(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, but for one that is being written."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def step(self) -> int:
        """The last step in the log, 0 before the first."""
        return max((record["step"] for record in self.records()), default=0)

    def course(self) -> list[tuple[Any, ...]]:
        """What must not depend on how a run came about: step, loss, gradient norm, learning rate, tokens, data."""
        names = ("step", "loss", "grad_norm", "lr", "tokens", "data_digest")
        return [tuple(record[name] for name in names) for record in self.records()]

    def status(self) -> dict[str, Any]:
        path = self.folder / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def log(self) -> Path:
        """The output of the ranks."""
        return self.folder.with_suffix(".log")

    def text(self) -> str:
        return self.log.read_text()

    def said(self) -> str:
        """The last line of the output that has words."""
        return next((line.strip() for line in reversed(self.text().splitlines()) if re.search(r"\w", line)), "nothing")


def write_inputs(folder: Path) -> Path:
    """The model and the text of the drills, made once in a folder; returns where."""
    inputs = folder / "inputs"
    if not (inputs / "text.jsonl").exists():
        inputs.mkdir(parents=True, exist_ok=True)
        (inputs / "model.json").write_text(json.dumps(MODEL))
        draw = random.Random(0)
        rows = (" ".join(f"{draw.randrange(1000)}" for _ in range(draw.randrange(20, 400))) for _ in range(600))
        (inputs / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return inputs


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie that nobody waits for is gone as well: its files are closed.
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")
