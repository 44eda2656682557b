"""A trainer that records the types in which its model multiplies, of the linear layers and of attention."""

import json
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flame.training.trainer import FlameTrainer

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::_grouped_mm")  # not in place: those of the loss sum in fp32


class Products(TorchDispatchMode):
    """Collects "operation type" of every product of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if name in _PRODUCTS or name.startswith("aten::_scaled_dot_product"):
            floating = [a.dtype for a in args[:3] if isinstance(a, torch.Tensor) and a.is_floating_point()]
            self.found.update(f"{name} {dtype}" for dtype in floating)
        return func(*args, **(kwargs or {}))


class TypedTrainer(FlameTrainer):
    """Writes types-RANK.json into the run folder: the products of forward and backward of each rank."""

    products = None

    def forward_backward_step(self, **inputs: Any) -> torch.Tensor:
        self.products = self.products or Products()
        with self.products:
            return super().forward_backward_step(**inputs)

    def close(self) -> None:
        rank = torch.distributed.get_rank()
        path = self.run.folder / f"types-{rank}.json"
        path.write_text(json.dumps(sorted(self.products.found if self.products else [])))
        super().close()
