"""Imports torchtitan and fla without what most runs never use: inductor, datasets and pandas."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

_TEXT = "torchtitan.hf_datasets.text_datasets"


@contextmanager
def on_demand() -> Iterator[None]:
    """In the block, a module that compiles functions as it is imported has them compiled when they are first called.

    Workarounds for torchtitan 0.2.2 (models/attention.py) and fla 0.6 (modules/activations/ops.py), which import
    inductor so; and for torchtitan's components/validate.py and models, which import its text data, and with it
    datasets and pandas: in the block they get functions that import it when they are called.
    """
    compile_now, stands_in = torch.compile, _TEXT not in sys.modules
    torch.compile = functools.partial(_compile_later, compile_now)
    if stands_in:
        sys.modules[_TEXT] = _Deferred(_TEXT)
    try:
        yield
    finally:
        torch.compile = compile_now
        if stands_in:
            del sys.modules[_TEXT]


class _Deferred(ModuleType):
    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):  # the import system asks for some
            raise AttributeError(name)
        return lambda *args, **kwargs: getattr(import_module(_TEXT), name)(*args, **kwargs)


def _compile_later(compile_now: Callable[..., Any], function: Any = None, **options: Any) -> Any:
    if function is None:
        return functools.partial(_compile_later, compile_now, **options)

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return compile_now(function, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # a caller that is compiled itself traces into the function, as it does into one that torch.compile has made
        return (function if torch.compiler.is_compiling() else compiled())(*args, **kwargs)

    return call
