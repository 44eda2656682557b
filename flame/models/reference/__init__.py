"""fla's `gla` and `transformer` in plain PyTorch, so that they build, train and generate on a machine without Triton.

fla's layers call a few entry points (norms, activations, rotary, short convolution, gated linear attention) that are
Triton kernels, and flash-attn. `enable()` puts a reference beside each: a CPU tensor takes the reference, any other
tensor takes fla's own kernel. Where flash-attn is not installed, PyTorch's attention serves on every device.

Why rebinding and not `fla.backends.register`: fla's dispatch wrappers are `torch.compiler.disable`d, so a registered
backend breaks the graph of a compiled block, and `chunk_gla`, `rms_norm` and flash-attn are not dispatched at all.
"""

import functools
import inspect
import sys
from collections.abc import Callable

from flame.models.reference.attention import flash_attn_func, flash_attn_varlen_func, rotary_embedding
from flame.models.reference.convolution import causal_conv1d, causal_conv1d_update
from flame.models.reference.linear_attention import gated_linear_attention
from flame.models.reference.norm import l2norm, norm, rms_norm_gated, sigmoid, swiglu, swiglu_linear, swish


@functools.cache  # so that a second call does nothing
def enable() -> None:
    """Serve fla's entry points from this module for CPU tensors; import fla. Calling it again does nothing."""
    import fla  # noqa: F401  (imports every layer, so that every global below exists)
    from fla.modules.activations import ops as activation
    from fla.modules.causal_conv1d import ops as conv
    from fla.modules.norm import fused_norm_gate, layernorm
    from fla.modules.norm import l2norm as l2
    from fla.modules.rotary import ops as rotary
    from fla.ops import attnres, gla

    references: tuple[tuple[Callable, Callable], ...] = (
        (layernorm.rms_norm, functools.partial(norm, is_rms_norm=True)),
        (layernorm.layer_norm, norm),
        (layernorm.group_norm, norm),
        (fused_norm_gate.rms_norm_gated, rms_norm_gated),
        (l2.l2norm, l2norm),
        (activation.swish, swish),
        (activation.sigmoid, sigmoid),
        (activation.swiglu, swiglu),
        (activation.swiglu_linear, swiglu_linear),
        (rotary.rotary_embedding, rotary_embedding),
        (conv.causal_conv1d, causal_conv1d),
        (conv.causal_conv1d_update, causal_conv1d_update),
        (gla.chunk_gla, gated_linear_attention),
        (gla.fused_recurrent_gla, gated_linear_attention),
        (attnres.fused_attnres, attnres.naive_attnres),  # fla's own reference
    )
    # The one seam. fla's files import each other's functions by name, so every module global that *is* an original
    # changes, and so does the activation table.
    replacements = {id(original): _on_cpu(reference, original) for original, reference in references}
    tables = [vars(module) for name, module in sys.modules.items() if name.startswith("fla.")]
    for table in [*tables, activation.ACT2FN]:
        for name, value in table.items():
            if id(value) in replacements:
                table[name] = replacements[id(value)]
        # fla's attention layers set flash_attn_func to None, and leave the other undefined, without flash-attn
        if "flash_attn_func" in table and str(table["__name__"]).startswith("fla.layers."):
            for name, reference in (("func", flash_attn_func), ("varlen_func", flash_attn_varlen_func)):
                original = table.get(f"flash_attn_{name}")
                table[f"flash_attn_{name}"] = _on_cpu(reference, original) if original else reference


def _on_cpu(reference: Callable, original: Callable) -> Callable:
    known = tuple(inspect.signature(reference).parameters)

    @functools.wraps(original)
    def call(*args, **kwargs):
        first = args[0] if args else kwargs[known[0]]
        if first.device.type != "cpu":
            return original(*args, **kwargs)
        for name in [name for name in kwargs if name not in known]:
            value = kwargs.pop(name)
            if value is not None and value is not False:  # swallowing it would silently compute something else
                raise NotImplementedError(f"{original.__name__}: {name} is not supported on CPU (found {value!r:.40})")
        return reference(*args, **kwargs)

    return call
