"""The software and the machine that the results of a run depend on."""

import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flame import __version__

PACKAGES = (
    *("torch", "triton", "torchtitan", "flash-linear-attention", "transformers", "datasets", "tokenizers"),
    *("fastokens", "safetensors", "numpy"),
)


def versions() -> dict[str, str]:
    """{package: version} of flame and of those of PACKAGES that are installed."""
    found = {"flame": __version__}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def describe_environment(device: dict[str, Any]) -> dict[str, Any]:
    """Versions, commit and machine of this process; no environment variable is recorded."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "git_commit": _git_commit(),
        "device": device,
    }


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    with suppress(OSError):
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True).stdout.decode().strip() or None
    return None
