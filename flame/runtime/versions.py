"""The versions of flame and of the packages that its results depend on."""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

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
