"""Lets torchtitan 0.2.2 run without an accelerator: on the CPU with gloo, through the same code path.

torchtitan reads its device once, when it is first imported, and says "cuda" when it finds none. So `choose()` comes
before that import. With an accelerator it changes nothing.
"""

import os
import resource
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch._utils
import torch.distributed as dist
import torch.profiler


def choose() -> str:
    """Choose the device of this process, before torchtitan is imported; returns its type ("cuda", "cpu", ...)."""
    device_type = torch._utils._get_available_device_type()
    if device_type is not None and device_type != "cpu":
        return device_type
    if torch.cpu.__dict__.get("_flame"):
        return "cpu"
    assert "torchtitan.tools.utils" not in sys.modules, "device.choose() must run before torchtitan is imported"
    torch._utils._get_available_device_type = lambda: "cpu"
    for name, function in _CPU_MODULE.items():  # what torchtitan asks of torch.cuda and torch.cpu does not have
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, function)
    dist.barrier = _barrier_without_devices(dist.barrier)
    torch.profiler.profile = _profile_known(torch.profiler.profile)  # type: ignore[misc]
    torch.cpu._flame = True  # type: ignore[attr-defined]
    return "cpu"


def _peak_memory(_device: Any = None) -> dict[str, int]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "num_alloc_retries": 0,
        "num_ooms": 0,
        "active_bytes.all.peak": peak,
        "reserved_bytes.all.peak": peak,
    }


def _properties(_device: Any = None) -> SimpleNamespace:
    return SimpleNamespace(name="CPU", total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


_CPU_MODULE = {
    "get_device_name": lambda _device=None: "CPU",
    "get_device_properties": _properties,
    "reset_peak_memory_stats": lambda _device=None: None,
    "empty_cache": lambda: None,
    "memory_stats": _peak_memory,
}


def _profile_known(profile: Any) -> Any:
    # torchtitan asks for the activity of the CPU and of an accelerator, which is None here.
    def known(activities: Any, **options: Any) -> Any:
        return profile(activities=[each for each in activities if each is not None], **options)

    return known


def _barrier_without_devices(barrier: Any) -> Any:
    # torchtitan names the device of a barrier; torch.cpu.current_device() is the string "cpu" and gloo refuses it.
    def without_devices(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return barrier(group=group, async_op=async_op)

    return without_devices
