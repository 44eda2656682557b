"""Prints what a result of this machine holds for, as JSON: python -m scripts.gpu_check.machine"""

import importlib.metadata
import importlib.util
import json
import platform
import subprocess
from pathlib import Path

import torch

NAMES = (
    "torch",
    "triton",
    "torchtitan",
    "transformers",
    "flash-linear-attention",
    "flash-attn",
    "torchao",
    "accelerate",
)


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Of this checkout, with a + if its files differ; "unknown" without git."""
    command = ["git", "-C", str(Path(__file__).parents[2]), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe() -> dict[str, object]:
    found = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if found else None
    return {
        "device": properties and properties.name,
        "memory_gib": properties and round(properties.total_memory / 2**30),
        "capability": properties and f"{properties.major}.{properties.minor}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in NAMES}},
        "commit": commit(),
    }


if __name__ == "__main__":
    print(json.dumps(describe()))
