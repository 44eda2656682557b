"""Initial weights that do not depend on the layout: each module is drawn whole, seeded by its name, then sharded.

DTensor's own random init draws the same numbers on every CPU rank, and Hugging Face's `_init_weights` alone misses
what only constructors set. So each block is rebuilt by its own constructor, one at a time; a NaN left anywhere
afterwards is an error that names the tensor.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor, Replicate

from flame.models.parameters import local_tensor, strip_wrappers


@dataclass(frozen=True)
class Unit:
    """A module that is initialised on its own: its name, the (sharded) module, and how to build a fresh whole one."""

    name: str
    module: nn.Module
    build: Callable[[], nn.Module]


@torch.no_grad()
def init_weights(
    model: nn.Module,
    units: Iterable[Unit],
    init_module: Callable[[nn.Module], None],
    seed: int,
    constants: Mapping[str, float] | None = None,
    buffer_device: torch.device | None = None,
) -> None:
    """Set every parameter and buffer of `model`, which consists of `units` and of `constants`, {name: value}.

    `init_module` is Hugging Face's `_init_weights`. Buffers move to `buffer_device`, if there is one: FSDP2, which
    brings offloaded parameters to the GPU, leaves them where they are. Peak extra memory is one unit. Raises
    RuntimeError naming parameters or buffers that nothing initialised.
    """
    for name, tensor in _floating_point(model):
        tensor.fill_((constants or {}).get(name, float("nan")))
    for unit in units:
        _init_unit(unit, init_module, seed)
    unset = [name for name, tensor in _floating_point(model) if tensor.isnan().any()]
    if unset:
        raise RuntimeError(f"initialisation left {len(unset)} tensors unset: {', '.join(unset[:8])}")
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(buffer_device or buffer.device))


def _floating_point(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((name, local_tensor(tensor)) for name, tensor in _tensors(model) if tensor.is_floating_point())


def _init_unit(unit: Unit, init_module: Callable[[nn.Module], None], seed: int) -> None:
    targets = dict(_tensors(unit.module))
    if not targets:
        return
    device = local_tensor(next(iter(targets.values()))).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device, _nan_in_new_memory():
        torch.manual_seed(_derive_seed(unit.name, seed))
        # as transformers does: RWKV-7's constructor marks modules that it has initialised itself
        fresh = unit.build().apply(lambda m: None if getattr(m, "_is_hf_initialized", False) else init_module(m))
    values = dict(_tensors(fresh))
    assert values.keys() == targets.keys(), f"{unit.name}: {sorted(values.keys() ^ targets.keys())}"
    for name, target in targets.items():
        _copy(target, values[name])


@contextlib.contextmanager
def _nan_in_new_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that what a constructor allocates and nothing sets shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # this mode fills new memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _derive_seed(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "big")


def _copy(target: torch.Tensor, value: torch.Tensor) -> None:
    if isinstance(target, DTensor):
        mesh = target.device_mesh
        whole = DTensor.from_local(
            value.detach().to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False
        )
        value = whole.redistribute(placements=target.placements).to_local()
    local_tensor(target).copy_(value)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((strip_wrappers(n), tensor) for n, tensor in [*module.named_parameters(), *module.named_buffers()])
