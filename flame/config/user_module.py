"""Imports modules that the user names, from the working folder too.

The scripts that start flame set PYTHONSAFEPATH, so that no other import finds a file there: the working folder may be a
run of somebody else, with a numpy.py in it.
"""

import importlib
import importlib.util
import os
import sys
from types import ModuleType


def import_module(name: str) -> ModuleType:
    """Import a module that the user named. Raises whatever it raises."""
    _search_here()
    return importlib.import_module(name)


def is_found(name: str) -> bool:
    """Whether there is such a module; its package is not imported."""
    _search_here()
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def _search_here() -> None:
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
