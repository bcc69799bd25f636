"""GPUs: whether the compiled module has code for a GPU, and the lifetime of tensors that streams and graphs read."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ddpm_ext.ops.extension import BUILT, mend
from ddpm_ext.ops.torch_library import is_traced

GRAPH_DEVICES = ("cuda",)  # device types whose work a CUDA graph can capture
# {id: tensor} of tensors that CUDA graphs read. They are never freed, since a graph may be replayed at any time.
_captured: dict[int, Tensor] = {}
# {owner: {(device, stream): the number of the owner's tensors at the last record_stream}}. See in_use.
_stream_counts: WeakKeyDictionary[object, dict[tuple[torch.device, int], int]] = WeakKeyDictionary()


def runs_on(capability: tuple[int, int], archs: str) -> bool:
    """Whether code for these architectures, such as "8.0 9.0+PTX", runs on a GPU of this compute capability.

    Machine code runs on GPUs of the same major version with the same or a later minor version. PTX runs on all later
    GPUs. Code with an "f", as in 10.0f, runs on its major version only, even as PTX; code with an "a", as in 9.0a, runs
    on no other GPU. The result is True for names such as "Hopper", which only torch's builder can resolve.
    """
    for arch in archs.split():
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if match is None:
            return True
        target = int(match[1]), int(match[2])
        has_ptx = match[4] and not match[3]
        if target == capability or (
            target < capability and match[3] != "a" and (has_ptx or target[0] == capability[0])
        ):
            return True
    return False


@functools.cache
def lacks_code_for(index: int | None) -> str:
    """Why the kernels have no code for a GPU, with the command that builds them for it. "" if they have code.

    Also "" if ddpm_ext was built without CUDA or torch can use no GPU.
    """
    if not BUILT["archs"] or not torch.cuda.is_available():
        return ""
    capability = torch.cuda.get_device_capability(index)
    if runs_on(capability, BUILT["archs"]):
        return ""
    arch = ".".join(map(str, capability))
    return (
        f"{torch.cuda.get_device_name(index)} has compute capability {arch}, and ddpm_ext was compiled for "
        f"{BUILT['archs']}; {mend(f'TORCH_CUDA_ARCH_LIST={arch} ')}"
    )


def check_card(device: torch.device) -> None:
    """Raises ValueError for a GPU that the module has no code for."""
    if device.type == "cuda" and not is_traced() and (why := lacks_code_for(device.index)):
        raise ValueError(f"device is {device}, expected one that can run the kernels: {why}")


def stream_captures() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    # is_current_stream_capturing raises an error on systems without a driver, where fake tensors may be on a GPU.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _stream_number(device: torch.device) -> int:
    """The handle of the device's current stream, as an int; 0 if CUDA is not in use."""
    return torch._C._cuda_getCurrentRawStream(device.index) if torch.cuda.is_initialized() else 0


def in_use(owner: object, tensors: Mapping[Any, Tensor], device: torch.device) -> None:
    """Keeps the memory of an owner's tensors valid until the device's current stream has read them.

    Without this, a cache could drop a tensor while a kernel that reads it is queued, and torch's allocator could give
    the memory to another tensor. During a capture of a CUDA graph, the tensors are stored forever, since each replay
    reads them. Otherwise record_stream makes the allocator wait for the stream before it reuses the memory.

    Args:
        owner: the object that has the tensors. For a second call on the same stream with as many tensors, record_stream
            is not repeated.
        tensors: the owner's tensors, of which those on `device` count.
    """
    if is_traced() or device.type not in GRAPH_DEVICES:
        return
    if stream_captures():
        _captured.update({id(x): x for x in list(tensors.values()) if x.device == device})
        return
    counts, stream = _stream_counts.setdefault(owner, {}), (device, _stream_number(device))
    if counts.get(stream) != len(tensors):
        counts[stream] = len(tensors)
        for x in list(tensors.values()):
            if x.device == device:
                x.record_stream(torch.cuda.current_stream(device))
