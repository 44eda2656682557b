"""torchtitan's config modules without torch: in well under a second instead of four."""

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """In the block, stand-ins for torch, torchtitan and torchtitan.config, so that config modules can be imported.

    torchtitan/__init__ of 0.2.2 imports quantization and with it inductor (3 to 4 s), while torchtitan/config needs
    only the name of torch. The modules of a package that has nothing but __path__ are found without its __init__.
    Modules that are loaded already are left alone.
    """
    titan = importlib.util.find_spec("torchtitan")
    assert titan is not None and titan.submodule_search_locations, "torchtitan is not installed"
    root = Path(titan.submodule_search_locations[0])
    paths: dict[str, list[str]] = {"torch": [], "torchtitan": [str(root)], "torchtitan.config": [str(root / "config")]}
    added = [name for name in paths if name not in sys.modules]
    for name in added:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = paths[name]
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]
