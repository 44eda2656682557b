"""torchtitan 0.2.2's `clip_grad_norm_` (distributed/utils.py) in two halves: the norm is agreed on before it clips."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


class Gradients:
    """Those of a rank's model parts. pipeline: the mesh of the stages, None without a pipeline.

    Neither method waits for the device.
    """

    def __init__(self, parts: Iterable[nn.Module], pipeline: DeviceMesh | None, device: torch.device) -> None:
        # A norm spans tensors of one mesh alone, and experts have their own.
        groups: dict[bool, list[nn.Parameter]] = {}
        for parameter in (parameter for part in parts for parameter in part.parameters()):
            mesh = parameter.device_mesh.mesh_dim_names if isinstance(parameter, DTensor) else None
            groups.setdefault("ep" in (mesh or ()), []).append(parameter)
        self._groups = list(groups.values())
        self._pipeline, self._zero = pipeline, torch.zeros((), device=device)

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        """The L2 norm of the whole job's gradients, float scalar, the same on all ranks."""
        norms = [self._norm(group) for group in self._groups]
        total = norms[0] if len(norms) == 1 else (norms[0] ** 2 + norms[1] ** 2) ** 0.5
        if self._pipeline is not None:
            total = total**2
            dist.all_reduce(total, group=self._pipeline.get_group())
            total = total**0.5
        return total

    def clip(self, max_norm: float, norm: torch.Tensor) -> None:
        """Scale the gradients to max_norm where their norm is larger; they stay as they are where it is not finite."""
        for group in self._groups:
            nn.utils.clip_grads_with_norm_(group, max_norm, norm.nan_to_num(0.0, 0.0, 0.0), foreach=True)

    def _norm(self, parameters: list[nn.Parameter]) -> torch.Tensor:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return self._zero
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
