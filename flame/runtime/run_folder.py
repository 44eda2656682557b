"""The records in a run folder: config.toml, environment.json, metrics.jsonl, status.json."""

import errno
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from flame.runtime.atomic import write_atomically
from flame.runtime.environment import describe_environment

Status = Literal["running", "completed", "data_exhausted", "preempted", "failed"]
logger = logging.getLogger("flame")


class Run:
    """One run's folder. Only the rank that logs writes; on the others every method does nothing.

    A run goes on when its metrics or status cannot be written (disk full): a warning is logged, and metrics wait in
    memory.
    """

    def __init__(self, folder: str | Path, writes: bool) -> None:
        self.folder = Path(folder)
        self.writes = writes
        self._waiting = ""  # lines for metrics.jsonl
        self._failing: set[str] = set()  # files whose last write failed

    def start(self, config_toml: str, device: dict[str, Any]) -> None:
        """Write config.toml and environment.json, and set the status to running. Raises OSError."""
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "config.toml", config_toml)
        write_atomically(self.folder / "environment.json", _to_json(describe_environment(device)))
        self.set_status("running")

    def set_status(self, status: Status, **fields: Any) -> None:
        """Replace status.json; fields that are not given keep their value, but `reason`, which becomes None."""
        if not self.writes:
            return
        self._flush()
        kept = {"step": 0, "tokens": 0} | self.read_status()
        text = _to_json({**kept, "reason": None, **fields, "status": status})
        self._write("status.json", lambda path: write_atomically(path, text))

    def read_status(self) -> dict[str, Any]:
        """The last status, or {} if there is none."""
        try:
            return json.loads((self.folder / "status.json").read_text())
        except (FileNotFoundError, ValueError):  # a power cut can leave it empty
            return {}

    def log(self, record: dict[str, Any]) -> None:
        """Append one step's metrics to metrics.jsonl."""
        if self.writes:
            self._waiting += json.dumps(record) + "\n"
            self._flush()

    def rewind(self, step: int) -> None:
        """Move metrics of steps after `step`, which are done again, and broken lines to metrics.replaced.jsonl.

        Raises OSError.
        """
        path = self.folder / "metrics.jsonl"
        if not self.writes or not path.exists():
            return
        lines = path.read_bytes().splitlines()
        kept = [line for line in lines if _step(line) <= step]
        if len(kept) < len(lines):
            with open(self.folder / "metrics.replaced.jsonl", "ab") as file:
                file.writelines(line + b"\n" for line in lines if _step(line) > step)
        write_atomically(path, b"".join(line + b"\n" for line in kept))

    def _flush(self) -> None:
        if self._waiting and self._write("metrics.jsonl", lambda path: _append(path, self._waiting)):
            self._waiting = ""

    def _write(self, name: str, write: Callable[[Path], None]) -> bool:
        """Whether a file could be written; a failure is logged once until a write succeeds."""
        try:
            write(self.folder / name)
        except OSError as error:
            if name not in self._failing:
                logger.warning(f"{self.folder / name} could not be written: {error.strerror}; the run goes on")
            self._failing.add(name)
            return False
        self._failing.discard(name)
        return True


def _to_json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=2) + "\n"


def _step(line: bytes) -> float:
    """The step of a record; infinity for a broken line: a kill cuts the last one, a power cut leaves zeros."""
    try:
        return int(json.loads(line.decode())["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _append(path: Path, text: str) -> None:
    """Append all of a text to a file, or nothing: half a line would spoil the next one. Raises OSError."""
    with open(path, "ab", buffering=0) as file:
        end, data = file.tell(), text.encode()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise
