"""Chooses the device, and lets torchtitan 0.2.2 train on a CPU with gloo, through the code it has for GPUs."""

import os
import resource
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch._utils
import torch.distributed as dist
import torch.profiler
from torch.utils.weak import WeakTensorKeyDictionary

_SOURCES = WeakTensorKeyDictionary()  # {a tensor on a device: the CPU tensor of which it is a copy}


def choose(cpu: bool = False) -> str:
    """Choose the device of this process; returns its type ("cuda", "cpu", ...). Comes before torchtitan's import.

    Without an accelerator, or with `cpu`, torch is patched where torchtitan takes one for granted; else nothing is.
    """
    ask = torch._utils._get_available_device_type
    device_type = ask()
    if device_type not in (None, "cpu") and not cpu:
        return device_type
    if device_type != "cpu":
        assert "torchtitan.tools.utils" not in sys.modules, "device.choose() must run before torchtitan is imported"
        _find_cpu()
        _complete_cpu_module()
        _drop_barrier_device()
        _drop_missing_activity()
    if device_type not in (None, "cpu"):
        import torchtitan.tools.utils  # noqa: F401  (asks now; later, torch's own functions for the accelerator ask, too)

        torch._utils._get_available_device_type = ask
    return "cpu"


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on a device, by a copy that the host does not wait for; on a CPU the tensor itself."""
    if device.type == "cpu":
        return tensor
    copy = tensor.pin_memory().to(device, non_blocking=True)
    _SOURCES[copy] = tensor
    return copy


def source(copy: torch.Tensor) -> torch.Tensor | None:
    """What `upload` made a tensor from, so that its values can be read without waiting; None of any other tensor."""
    return copy if copy.device.type == "cpu" else _SOURCES.get(copy)


def download(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Launch a copy to the host. What is returned waits for it, not for what is launched since, and gives the copy."""
    host = tensor.to("cpu", non_blocking=True)
    copied = None if tensor.device.type == "cpu" else torch.accelerator.current_stream().record_event()

    def wait() -> torch.Tensor:
        if copied is not None:
            copied.synchronize()
        return host

    return wait


def _find_cpu() -> None:
    """tools/utils.py asks torch for a device type once, when it is imported, and takes "cuda" if there is none."""
    torch._utils._get_available_device_type = lambda: "cpu"


def _complete_cpu_module() -> None:
    """components/metrics.py calls functions of torch.cuda on torch.cpu, which lacks them; memory is the process's."""

    def memory_stats(device: Any = None) -> dict[str, int]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        counts = {"num_alloc_retries": 0, "num_ooms": 0}
        return counts | {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak}

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    missing = {
        "get_device_name": lambda device=None: "CPU",
        "get_device_properties": lambda device=None: SimpleNamespace(name="CPU", total_memory=memory),
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_stats": memory_stats,
    }
    for name, function in missing.items():
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, function)


def _drop_barrier_device() -> None:
    """distributed/utils.py names the device of a barrier; torch.cpu's is the string "cpu", which gloo rejects."""
    barrier: Any = dist.barrier
    anywhere: Any = lambda group=None, async_op=False, device_ids=None, **options: barrier(group, async_op, **options)
    dist.barrier = anywhere


def _drop_missing_activity() -> None:
    """tools/profiling.py profiles the CPU and an accelerator, whose activity is None without one."""
    profile: Any = torch.profiler.profile
    present: Any = lambda activities, **options: profile(activities=[a for a in activities if a is not None], **options)
    torch.profiler.profile = present  # type: ignore[misc]
