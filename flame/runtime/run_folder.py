"""The records in a run folder: config.toml, environment.json, metrics.jsonl, status.json."""

import errno
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

from flame.config.files import itself, parse_json, read_bytes, read_json
from flame.config.paths import command
from flame.config.record import has_comments, read_record
from flame.errors import UserError
from flame.runtime.atomic import replace_together, write_atomically

Status = Literal["running", "completed", "data_exhausted", "preempted", "failed"]
logger = logging.getLogger("flame")
_WRITTEN = ("config.toml", "environment.json", "status.json", "model")  # anew at each start
# All that a run keeps under fixed names.
FILES = (*_WRITTEN, "metrics.jsonl", "metrics.replaced.jsonl", "lock", "logs", "hf", "wandb_run_id")


def check_own(folder: Path) -> None:
    """Raises UserError for a folder that no run has made and that has a file in the place of a run's own.

    A run is known by its status, which a start writes first, or by its config.toml.
    """
    if _read_status(folder).get("status") in get_args(Status) or read_record(folder) is not None:
        return
    for path in (folder / name for name in _WRITTEN):
        try:
            if path.is_dir():
                is_ours = all(re.fullmatch(r".+\.\d+\.tmp", name) for name in os.listdir(path))  # killed in `begin`
            else:
                is_ours = path.exists() and not path.stat().st_size  # a power cut can leave a file empty
        except OSError as error:
            raise UserError("--job.dump_folder", hint=str(error)) from None
        if os.path.lexists(path) and not is_ours:
            hint = f"{path} is not a run's, and would be overwritten; move it, or name another folder"
            raise UserError("--job.dump_folder", folder, "a new folder or that of a run", hint)


class Run:
    """One run's folder. Only the rank that logs writes; on the others every method does nothing.

    A run goes on when its metrics or status cannot be written (disk full): a warning is logged, and metrics wait in
    memory.
    """

    _place: os.stat_result  # of the folder that `begin` wrote to

    def __init__(self, folder: str | Path, writes: bool) -> None:
        self.folder = Path(folder)
        self.writes = writes
        self._waiting = ""  # lines for metrics.jsonl
        self._failing: set[str] = set()  # files whose last write failed

    @contextmanager
    def begin(self, files: Mapping[str, str | bytes], **fields: Any) -> Iterator[None]:
        """Write the records of a start and the status "running": all at the end of the block, or none. Raises OSError.

        A config.toml with comments, which are the user's, is kept as config.old-N.toml.
        """
        status = {"status.json": to_json(self._describe("running", fields))}  # first: a run is known by it
        with replace_together({self.folder / name: data for name, data in (status | self._keep(files)).items()}):
            yield
        self._place = self.folder.stat()

    def _keep(self, files: Mapping[str, str | bytes]) -> dict[str, str | bytes]:
        path = self.folder / "config.toml"
        known = read_bytes(path) if "config.toml" in files and path.exists() else b""
        before = known.decode(errors="surrogateescape")
        if not has_comments(before):
            return dict(files)
        names = (f"config.old-{n}.toml" for n in count(1))
        free = next(name for name in names if not os.path.lexists(self.folder / name))
        return {free: known, **files}

    def capture(self, write: Callable[[Path], None]) -> dict[str, bytes]:
        """What `write` writes into a folder, as files of model/. Raises OSError."""
        folder = self.folder / ".model.tmp"
        shutil.rmtree(folder, ignore_errors=True)  # of a start that was killed
        if os.path.lexists(folder):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
        try:
            write(folder)
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            return {f"model/{path.relative_to(folder)}": path.read_bytes() for path in files}
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def rewound(self, step: int) -> dict[str, bytes]:
        """The files of metrics without those of steps after `step`, which are done again, and without broken lines.

        metrics.replaced.jsonl gets both. Raises OSError.
        """
        path, replaced = self.folder / "metrics.jsonl", self.folder / "metrics.replaced.jsonl"
        if not path.exists():
            return {}
        lines = [line + b"\n" for line in read_bytes(path).splitlines()]
        kept = b"".join(line for line in lines if _step(line) <= step)
        moved = b"".join(line for line in lines if _step(line) > step)
        before = read_bytes(replaced) if replaced.exists() else b""
        if before.endswith(moved):  # or nothing moves; or a kill came between the two files
            return {path.name: kept}
        return {replaced.name: before + moved, path.name: kept}

    def check_place(self) -> None:
        """Raises UserError if the folder with the records of `begin` is not there any more.

        Another one under its name, which whatever else writes to the run may have made, is none.
        """
        if not self.writes:
            return
        if not (self.folder / "status.json").exists() or not os.path.samestat(self.folder.stat(), self._place):
            hint = "it was moved or deleted; what was saved in it before can be resumed where it is now"
            raise UserError("--job.dump_folder", f"no records of this run in {self.folder}", hint=hint)

    def set_status(self, status: Status, **fields: Any) -> None:
        """Replace status.json; fields that are not given keep their value, but `reason`, which becomes None."""
        if not self.writes:
            return
        self._flush()
        text = to_json(self._describe(status, fields))
        self._write("status.json", lambda path: write_atomically(path, text))

    def _describe(self, status: Status, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {"step": 0, "tokens": 0, **self.read_status(), "reason": None, **fields, "status": status}

    def read_status(self) -> dict[str, Any]:
        """The last status, or {} if there is none."""
        return _read_status(self.folder)

    def describe_complete(self, step: int, steps: int) -> str:
        """What a start of a run that has done its steps logs."""
        return f"This job is complete: step {step} of {steps} is done; nothing was trained."

    def describe_end(self, step: int, checkpoint: Path | None, export: Path | None, newer: int | None = None) -> str:
        """What a run ends with: its status, and where everything is. newer: a later step that has a checkpoint."""
        lines = [f"{self.read_status()['status']} at step {step}", f"metrics      {self.folder / 'metrics.jsonl'}"]
        if checkpoint:
            lines.append(f"checkpoint   {checkpoint}")
        if export:
            lines.append(f"model        {export}  (Hugging Face format)")
        if newer:
            lines.append(f"note         step {newer} is there as well, and is what a resume takes")
        go_on = command("train.sh", "--job.config_file", self.folder / "config.toml", "--training.steps", "N")
        return "\n  ".join([*lines, f"go on        {go_on}"])

    def log(self, record: dict[str, Any]) -> None:
        """Append one step's metrics to metrics.jsonl."""
        if self.writes:
            self._waiting += json.dumps(record) + "\n"
            self._flush()

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


def _read_status(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "status.json")
    except (OSError, ValueError):  # a power cut can leave it empty
        return {}


def to_json(fields: Mapping[str, Any]) -> str:
    """The text of a record."""
    return json.dumps(fields, indent=2) + "\n"


def _step(line: bytes) -> float:
    """The step of a record; infinity for a broken line: a kill cuts the last one, a power cut leaves zeros."""
    try:
        return int(parse_json(line.decode())["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _append(path: Path, text: str) -> None:
    """Append all of a text to a file, or nothing: half a line would spoil the next one. Raises OSError."""
    with open(path, "ab", buffering=0, opener=itself) as file:
        end, data = file.tell(), text.encode()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise
