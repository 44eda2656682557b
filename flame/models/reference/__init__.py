"""fla's models in plain PyTorch, so that they build, train and generate on a machine without Triton.

fla's layers call entry points (norms, activations, rotary, short convolution, token mixers) that are Triton kernels,
and flash-attn. Each module here names, in `pairs()`, the entry points of fla that it serves and the reference of each;
`enable()` puts the one beside the other: a CPU tensor takes the reference, any other tensor takes fla's own kernel.
Where flash-attn is not installed, PyTorch's attention serves on every device.

Why rebinding and not `fla.backends.register`: fla's dispatch wrappers are `torch.compiler.disable`d, so a registered
backend breaks the graph of a compiled block, and `chunk_gla`, `rms_norm` and flash-attn are not dispatched at all.
"""

import functools
import inspect
import sys
from collections.abc import Callable

from torch import nn

from flame.errors import UserError
from flame.models.reference import (
    attention,
    convolution,
    delta_rule,
    gate,
    gsa,
    hgrn,
    lightnet,
    linear_attention,
    mamba,
    norm,
    rwkv,
    simple_gla,
    token_shift,
)

_PARTS = (
    attention,
    convolution,
    delta_rule,
    gate,
    gsa,
    hgrn,
    lightnet,
    linear_attention,
    mamba,
    norm,
    rwkv,
    simple_gla,
    token_shift,
)
# The model types of fla whose training and generation run on these references alone; a test holds each of them.
_SERVED = frozenset(
    {
        *("delta_net", "gated_deltanet", "gated_deltaproduct", "kda"),
        *("gla", "gsa", "hgrn", "hgrn2", "lightnet", "linear_attn", "mla", "retnet", "transformer"),
        *("mamba", "mamba2", "rwkv6", "rwkv7", "samba"),
    }
)


def check_supported(model_type: str) -> None:
    """Refuse a model type of fla that has no reference, and so cannot run on a CPU. Raises UserError."""
    if model_type not in _SERVED:
        raise UserError(
            f'--model.config: fla\'s model_type "{model_type}" has no CPU path, only Triton kernels that need a GPU; '
            f"on a CPU flame runs {', '.join(sorted(_SERVED))}"
        )


@functools.cache  # so that a second call does nothing
def enable() -> None:
    """Serve fla's entry points from this package for CPU tensors; import fla. Calling it again does nothing."""
    import fla  # noqa: F401  (imports every layer, so that every global below exists)
    from fla.modules.activations.ops import ACT2FN

    references = [pair for part in _PARTS for pair in part.pairs()]
    # The one seam. fla's files import each other's functions by name, so every module global that *is* an original
    # changes, and so does the activation table.
    replacements = {id(original): _on_cpu(reference, original) for original, reference in references}
    tables = [vars(module) for name, module in sys.modules.items() if name.startswith("fla.")]
    for table in [*tables, ACT2FN]:
        for name, value in table.items():
            if id(value) in replacements:
                table[name] = replacements[id(value)]
        # fla's attention layers set flash_attn_func to None, and leave the other undefined, without flash-attn
        if "flash_attn_func" in table and str(table["__name__"]).startswith("fla.layers."):
            for name, reference in (
                ("func", attention.flash_attn_func),
                ("varlen_func", attention.flash_attn_varlen_func),
            ):
                original = table.get(f"flash_attn_{name}")
                table[f"flash_attn_{name}"] = _on_cpu(reference, original) if original else reference
    for layer, reference in mamba.layers():  # what fla runs on a CPU is a method here, not a global
        layer.forward = _on_cpu(reference, layer.forward)


def _on_cpu(reference: Callable, original: Callable) -> Callable:
    known = tuple(inspect.signature(reference).parameters)

    # Without the attributes of the original, of which torch.compiler.disable's would break the graph of the reference.
    @functools.wraps(original, updated=())
    def call(*args, **kwargs):
        first = args[0] if args else kwargs[known[0]]
        if isinstance(first, nn.Module):
            first = next(first.parameters())
        if first.device.type != "cpu":
            return original(*args, **kwargs)
        for name in [name for name in kwargs if name not in known]:
            value = kwargs.pop(name)
            if value is not None and value is not False:  # swallowing it would silently compute something else
                found = f"{name} is not supported on CPU (found {value!r:.40})"
                raise NotImplementedError(f"{original.__qualname__}: {found}")
        return reference(*args, **kwargs)

    return call
