"""Norms, gated norms and activations."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.models.reference.common import wide


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None, eps: float = 1e-5,
    prenorm: bool = False, residual_in_fp32: bool = False, is_rms_norm: bool = False, num_groups: int = 1,
    *, gate: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Layer norm of x + residual (..., D), in num_groups equal parts of D; with prenorm return that sum too.

    is_rms_norm leaves out the subtraction of the mean (arXiv 1910.07467); gate (..., D) multiplies the result.
    """
    total = wide(x)
    total_dtype = torch.float32 if residual_in_fp32 else x.dtype
    if residual is not None:  # whose dtype wins over residual_in_fp32, as in the kernels
        total, total_dtype = total + wide(residual), residual.dtype
    y = total.unflatten(-1, (num_groups, -1))
    if not is_rms_norm:
        y = y - y.mean(-1, keepdim=True)
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    if weight is not None:
        y = y * wide(weight)
    if bias is not None:
        y = y + wide(bias)
    if gate is not None:
        y = y * gate
    return (y.to(x.dtype), total.to(total_dtype)) if prenorm else y.to(x.dtype)


def rms_norm_gated(
    x: Tensor, g: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str = "swish",
    residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False, eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """RMS `norm` times the activation ("swish", "silu" or "sigmoid") of the gate g (..., D)."""
    gates: dict[str, Callable] = {"swish": F.silu, "silu": F.silu, "sigmoid": torch.sigmoid}
    gate = gates[activation](wide(g))
    return norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm=True, gate=gate)


def norm_linear(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, linear_weight: Tensor,
    linear_bias: Tensor | None, residual: Tensor | None = None, eps: float = 1e-5, prenorm: bool = False,
    residual_in_fp32: bool = False, is_rms_norm: bool = False, num_groups: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """A linear layer on `norm`."""
    y = norm(x, norm_weight, norm_bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm, num_groups)
    return _linear(y, linear_weight, linear_bias)


def rms_norm_swish_gate_linear(
    x: Tensor, g: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, linear_weight: Tensor,
    linear_bias: Tensor | None, residual: Tensor | None = None, prenorm: bool = False,
    residual_in_fp32: bool = False, eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """A linear layer on `rms_norm_gated`."""
    y = rms_norm_gated(x, g, norm_weight, norm_bias, "swish", residual, prenorm, residual_in_fp32, eps)
    return _linear(y, linear_weight, linear_bias)


def _linear(y: Tensor | tuple[Tensor, Tensor], weight: Tensor, bias: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    if isinstance(y, tuple):  # a prenorm's second output passes by
        return F.linear(y[0].to(weight.dtype), weight, bias), y[1]
    return F.linear(y.to(weight.dtype), weight, bias)


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """Divide x (..., D) by the root of its sum of squares plus eps."""
    y = wide(x)
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + eps)).to(output_dtype or x.dtype)


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """swish(x) * y. Source: arXiv 2002.05202."""
    return F.silu(x) * y


def swiglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer on `swiglu`."""
    return F.linear(F.silu(x) * y, weight, bias)


def powglu(x: Tensor, y: Tensor, power: float = 3.0) -> Tensor:
    """y times a gate of x: swish where x <= 0, else x^p sigmoid(x), p = power / (sqrt(x) + 1)."""
    gate = wide(x)
    above = gate.clamp(min=torch.finfo(gate.dtype).tiny)  # of what is not positive, no root and no logarithm
    grown = torch.exp(power / (above.sqrt() + 1) * above.log())
    return (torch.where(gate > 0, grown, gate) * gate.sigmoid() * wide(y)).to(x.dtype)


def powglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, power: float = 3.0) -> Tensor:
    """A linear layer on `powglu`."""
    return F.linear(powglu(x, y, power), weight, bias)


def pairs() -> list[tuple[Callable, Callable]]:
    """Entry points of fla, each with its reference here."""
    from fla.modules.activations import ops as activation
    from fla.modules.norm import fused_norm_gate, layernorm
    from fla.modules.norm import l2norm as l2

    return [
        (layernorm.rms_norm, functools.partial(norm, is_rms_norm=True)),
        (layernorm.layer_norm, norm),
        (layernorm.group_norm, norm),
        (layernorm.layer_norm_linear, norm_linear),  # rms_norm_linear and group_norm_linear call it
        (fused_norm_gate.rms_norm_gated, rms_norm_gated),
        (fused_norm_gate.rms_norm_swish_gate_linear, rms_norm_swish_gate_linear),
        (l2.l2norm, l2norm),
        (activation.swish, lambda x: F.silu(x)),
        (activation.sigmoid, lambda x: torch.sigmoid(x)),
        (activation.swiglu, swiglu),
        (activation.swiglu_linear, swiglu_linear),
        (activation.powglu, powglu),
        (activation.powglu_linear, powglu_linear),
    ]
