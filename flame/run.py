"""The run folder: config.toml, environment.json, metrics.jsonl, status.json: what a person or a script asks first."""

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

Status = Literal["running", "completed", "data_exhausted", "preempted", "failed"]
_PACKAGES = (
    "torch",
    "triton",
    "torchtitan",
    "flash-linear-attention",
    "transformers",
    "datasets",
    "tokenizers",
    "numpy",
)


class Run:
    """One run's folder. Only the rank that logs writes; on the others every method does nothing."""

    def __init__(self, folder: str | Path, writes: bool) -> None:
        self.folder = Path(folder)
        self.writes = writes

    def start(self, config_toml: str, device: dict[str, Any]) -> None:
        """Write config.toml and environment.json, and say that the run is running."""
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        _replace(self.folder / "config.toml", config_toml)
        _replace(self.folder / "environment.json", _to_json(describe_environment(device)))
        self.set_status("running")

    def set_status(self, status: Status, **fields: Any) -> None:
        """Replace status.json; step, tokens and reason stay from before unless given."""
        if not self.writes:
            return
        kept = {"step": 0, "tokens": 0} | self.read_status()
        _replace(self.folder / "status.json", _to_json({**kept, "reason": None, **fields, "status": status}))

    def read_status(self) -> dict[str, Any]:
        """The last status, or {} if there is none."""
        path = self.folder / "status.json"
        try:
            return json.loads(path.read_text())
        except (FileNotFoundError, ValueError):  # a power cut can leave it empty
            return {}

    def log(self, record: dict[str, Any]) -> None:
        """Append one step's metrics to metrics.jsonl."""
        if self.writes:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    def rewind(self, step: int) -> None:
        """Move records after `step` aside: the steps that follow will be done and logged again."""
        path = self.folder / "metrics.jsonl"
        if not self.writes or not path.exists():
            return
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]  # a kill can cut the last one
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        if len(kept) < len(lines):
            with open(self.folder / "metrics.replaced.jsonl", "a") as file:
                file.writelines(line + "\n" for line in lines if json.loads(line)["step"] > step)
        _replace(path, "".join(line + "\n" for line in kept))


def describe_environment(device: dict[str, Any]) -> dict[str, Any]:
    """Versions, commit and machine of this process; no environment variable is recorded."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
        "device": device,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here, capture_output=True)
    except OSError:
        return None
    return found.stdout.decode().strip() or None


def _to_json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=2) + "\n"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)  # a reader, or a kill, sees the old file or the new one
