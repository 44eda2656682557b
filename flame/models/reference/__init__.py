"""fla's models in plain PyTorch, so that they build, train and generate on a machine without Triton.

fla's layers call entry points (norms, activations, rotary, short convolution, token mixers) that are Triton kernels,
and flash-attn. Each module here lists, in `pairs()`, entry points of fla and their references; `enable()` rebinds them:
a CPU tensor goes to the reference, any other tensor to fla's own kernel. Without flash-attn, PyTorch's attention takes
its place on every device.

Why rebinding and not `fla.backends.register`: fla's dispatch wrappers are `torch.compiler.disable`d, so a registered
backend breaks the graph of a compiled block, and `chunk_gla`, `rms_norm` and flash-attn are not dispatched at all.
"""

import functools
import inspect
import sys
from collections.abc import Callable

import torch
from torch import nn

from flame.errors import UserError
from flame.models.reference import attention, convolution, delta_rule, gsa, linear_attention, mamba, norm, packing, rwkv
from flame.runtime.imports import on_demand

_MODULES = (attention, convolution, delta_rule, gsa, linear_attention, mamba, norm, rwkv)
# The model types of fla whose training and generation need these references alone; each has a test.
_SUPPORTED = frozenset(
    {
        *("delta_net", "gated_deltanet", "gated_deltaproduct", "kda"),
        *("gla", "gsa", "hgrn", "hgrn2", "lightnet", "linear_attn", "mla", "retnet", "transformer"),
        *("mamba", "mamba2", "rwkv6", "rwkv7", "samba"),
    }
)


def check_supported(model_type: str) -> None:
    """Check that a model type of fla can run on a CPU. Raises UserError if it has no references here."""
    if model_type not in _SUPPORTED:
        rule, hint = f"one of {', '.join(sorted(_SUPPORTED))} on a CPU", "others have only Triton kernels, for a GPU"
        raise UserError("--model.config", f"model_type {model_type!r}", rule, hint)


def check_kernels(model_type: str) -> None:
    """Check that a model type of fla can run on a GPU. Raises UserError if it needs packages that are not installed."""
    from fla.layers import mamba

    if model_type in ("mamba", "samba") and not (mamba.is_fast_path_available and mamba.causal_conv1d_fn):
        hint = "its scan on a GPU needs two packages: pip install --no-build-isolation causal-conv1d mamba-ssm"
        raise UserError("--model.config", f"model_type {model_type!r}", hint=hint)


@functools.cache
def enable() -> None:
    """Import fla and rebind its entry points for CPU tensors. Calling it again does nothing."""
    with on_demand():
        import fla  # noqa: F401  (imports every layer, so that every global below exists)
    from fla.layers.mamba import Mamba
    from fla.layers.mamba2 import Mamba2
    from fla.modules.activations.ops import ACT2FN

    references = [pair for module in _MODULES for pair in module.pairs()]
    # fla's files import each other's functions by name, so every module global that *is* an original is rebound, and
    # so is the activation table.
    replacements = {id(original): _on_cpu(reference, original) for original, reference in references}
    replacements |= {id(original): replacement for original, replacement in packing.pairs()}
    tables = [vars(module) for name, module in sys.modules.items() if name.startswith("fla.")]
    for table in [*tables, ACT2FN]:
        for name, value in table.items():
            if id(value) in replacements:
                table[name] = replacements[id(value)]
        # without flash-attn, fla's attention layers set flash_attn_func to None and leave the other undefined
        if "flash_attn_func" in table and str(table["__name__"]).startswith("fla.layers."):
            # the lengths of documents are for Python to read, not for a graph
            for reference in (attention.flash_attn_func, torch.compiler.disable(attention.flash_attn_varlen_func)):
                original = table.get(name := reference.__name__)
                table[name] = _on_cpu(reference, original) if original else reference
    Mamba.forward = _on_cpu(mamba.mamba, Mamba.forward)  # whose PyTorch code is a method, not a global
    Mamba2.forward = _on_cpu(mamba.mamba2, mamba.mamba2)  # on a GPU, too, where its own needs a package


def _on_cpu(reference: Callable, original: Callable) -> Callable:
    known = tuple(inspect.signature(reference).parameters)

    # Not the original's attributes: those of torch.compiler.disable would break the graph of the reference.
    @functools.wraps(original, updated=())
    def call(*args, **kwargs):
        first = args[0] if args else kwargs[known[0]]
        if isinstance(first, nn.Module):
            first = next(first.parameters())
        if first.device.type != "cpu":
            return original(*args, **kwargs)
        for name in [name for name in kwargs if name not in known]:
            value = kwargs.pop(name)
            if value is not None and value is not False:  # ignoring it would silently compute something else
                found = f"{name} is not supported on CPU (found {value!r:.40})"
                raise NotImplementedError(f"{original.__qualname__}: {found}")
        return reference(*args, **kwargs)

    return call
