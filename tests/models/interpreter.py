"""Run fla's Triton kernels on a CPU, in Triton's own interpreter: call `install()` in a fresh process, before fla.

Its workarounds were found with Triton 3.9. Use it in fp32 only: the interpreter computes bf16 as if it were uint16.
"""

import ast
import os
from typing import Any


def install() -> None:
    """Switch the interpreter on, before fla is imported: a kernel reads TRITON_INTERPRET when it is defined."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import autotuner, interpreter

    autotuner.Autotuner.run = _run_first_config
    interpreter.ASTTransformer.visit_For = _visit_for
    for name in ("create_masked_load", "create_masked_store"):
        _accept_integer_masks(interpreter, name, position=1 if name.endswith("load") else 2)


def _run_first_config(self: Any, *args: Any, **kwargs: Any) -> Any:
    # Autotuning times the configs on a GPU; here any of them will do.
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    config = self.prune_configs(kwargs)[0] if len(self.configs) > 1 else self.configs[0]
    if config.pre_hook is not None:
        config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
    try:
        return self.fn.run(*args, **kwargs, **config.all_kwargs())
    finally:
        self.nargs = None


def _visit_for(self: Any, node: ast.For) -> ast.For:
    # Compiled, the variable of `for i in range(n)` is an int32 tensor (kernels call i.to(...)); interpreted, an int.
    self.generic_visit(node)
    called = node.iter.func if isinstance(node.iter, ast.Call) else None
    name = getattr(called, "id", None) or getattr(called, "attr", None)
    if name == "range" and isinstance(node.target, ast.Name):
        variable = node.target.id
        node.body.insert(0, ast.parse(f"{variable} = interpreter_semantic.to_tensor({variable}, False)").body[0])
    return node


def _accept_integer_masks(interpreter: Any, name: str, position: int) -> None:
    # A mask built from scalar comparisons arrives as an integer.
    original = getattr(interpreter.InterpreterBuilder, name)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        mask = args[position]
        if mask.data.dtype != bool:
            mask = interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)
        return original(self, *args[:position], mask, *args[position + 1 :], **kwargs)

    setattr(interpreter.InterpreterBuilder, name, call)
