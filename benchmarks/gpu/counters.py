"""What a call launches, waits for and allocates, as torch tells it. On the CPU an operator stands for a launch."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

__all__ = ["Launches", "allocations", "launches", "profiler_works", "sync_mode_works", "synchronisation"]

# CUDA's calls that wait, copy or ask for memory. cudaDeviceSynchronize is the profiler's and ours, around the calls.
SLOW = re.compile(r"cu(da)?(Stream|Event)Synchronize|cu(da)?Mem(cpy|set|Alloc|Free)|cuda(Malloc|Free|HostAlloc)")


class Launches(NamedTuple):
    """Of some calls: kernels and copies by name, and the calls of CUDA among SLOW by name."""

    kernels: Counter[str]
    slow: Counter[str]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def launches(function: Callable[[], Any], device: torch.device, calls: int = 1) -> Launches:
    """Of `calls` calls, after one that isn't counted."""
    function()
    synchronize(device)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiler:
        for _ in range(calls):
            function()
        synchronize(device)  # what ends after the profile isn't in it
    kernels: Counter[str] = Counter()
    slow: Counter[str] = Counter()
    for event in profiler.events():
        if cuda and event.device_type == DeviceType.CUDA:
            # marks of ranges and of waits are events of the device as well
            if not getattr(event, "is_user_annotation", False) and not event.name.endswith("Sync"):
                kernels[event.name] += 1
        elif not cuda and event.name.startswith("ddpm_ext::"):
            kernels[event.name] += 1
        elif SLOW.match(event.name):
            slow[event.name] += 1
    return Launches(kernels, slow)


@functools.cache
def profiler_works(device: torch.device) -> str:
    """Empty where a known number of launches is seen, else what was seen: none are on a machine without CUPTI."""
    if device.type != "cuda":
        return ""
    x = torch.zeros(8, device=device)
    for _ in range(3):  # a first profile may lose some
        seen = sum(launches(lambda: x.add_(1), device, 10).kernels.values())
        if seen == 10:
            return ""
    return f"torch's profiler saw {seen} of 10 launches of torch's own"


def synchronisation(function: Callable[[], Any], device: torch.device) -> str:
    """What torch says of a wait of the host for the GPU in a second call; empty: none."""
    function()
    if device.type != "cuda":
        return ""
    synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return ""


@functools.cache
def sync_mode_works(device: torch.device) -> str:
    """Empty where a known wait is noticed."""
    if device.type != "cuda":
        return ""
    x = torch.zeros((), device=device)
    return "" if synchronisation(x.item, device) else "torch.cuda.set_sync_debug_mode doesn't notice .item()"


def allocations(function: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """How many blocks of memory a second call takes on the device, and their bytes. What it returns is kept by then."""
    function()
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_stats(device)
        kept = function()
        after = torch.cuda.memory_stats(device)
        keys = ("allocation.all.allocated", "allocated_bytes.all.allocated")
        blocks, size = (int(after[key]) - int(before[key]) for key in keys)
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            kept = function()
        taken = [event.self_cpu_memory_usage for event in profiler.events() if event.self_cpu_memory_usage > 0]
        blocks, size = len(taken), sum(taken)
    del kept
    return blocks, size
