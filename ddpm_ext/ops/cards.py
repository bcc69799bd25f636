"""GPUs: which ones the compiled module has code for, and for how long they read the memory of tables."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ddpm_ext.ops.extension import BUILT, mend
from ddpm_ext.ops.torch_library import is_recorded

CAPTURING = ("cuda",)  # the types of devices whose calls a graph can capture
_captured: dict[int, Tensor] = {}  # what CUDA graphs read, by id
# By owner and by (device, its stream's number), how many of the owner's tensors the allocator knows that stream for.
_known: WeakKeyDictionary[object, dict[tuple[torch.device, int], int]] = WeakKeyDictionary()


def runs_on(capability: tuple[int, int], archs: str) -> bool:
    """Whether code for these architectures, such as "8.0 9.0+PTX", runs on a GPU of a compute capability.

    Machine code runs on GPUs of its own major version, from its minor version on; PTX on all later ones. What is made
    for one architecture alone, such as 9.0a, runs nowhere else. True for names such as "Hopper", which only torch's
    builder knows.
    """
    for arch in archs.split():
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if found is None:
            return True
        made = int(found[1]), int(found[2])
        has_ptx = found[4] and not found[3]
        if made == capability or (made < capability and found[3] != "a" and (has_ptx or made[0] == capability[0])):
            return True
    return False


@functools.cache
def lacks_code_for(index: int | None) -> str:
    """Why the kernels cannot run on a GPU, and the command that builds them for it; "" where they can."""
    if not BUILT["archs"] or not torch.cuda.is_available():
        return ""
    capability = torch.cuda.get_device_capability(index)
    if runs_on(capability, BUILT["archs"]):
        return ""
    own = ".".join(map(str, capability))
    return (
        f"{torch.cuda.get_device_name(index)} has compute capability {own}, and ddpm_ext was compiled for "
        f"{BUILT['archs']}; {mend(f'TORCH_CUDA_ARCH_LIST={own} ')}"
    )


def check_card(device: torch.device) -> None:
    """Raises ValueError for a GPU that the module has no code for."""
    if device.type == "cuda" and not is_recorded() and (why := lacks_code_for(device.index)):
        raise ValueError(f"device is {device}, expected one that can run the kernels: {why}")


def stream_captures() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    # The second question raises an error where there is no driver, as for a fake tensor of a GPU.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _stream_number(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index) if torch.cuda.is_initialized() else 0


def in_use(owner: object, tensors: Mapping[Any, Tensor], device: torch.device) -> None:
    """Says that the device's current stream reads an owner's tensors, which a cache may drop while it does.

    A CUDA graph that is being captured will read them at each replay, so they stay for good. For any other stream than
    theirs, the allocator will wait before it gives their memory to somebody else.
    """
    if is_recorded() or device.type not in CAPTURING:
        return
    if stream_captures():
        _captured.update({id(x): x for x in list(tensors.values()) if x.device == device})
        return
    known, stream = _known.setdefault(owner, {}), (device, _stream_number(device))
    if known.get(stream) != len(tensors):
        known[stream] = len(tensors)
        for x in list(tensors.values()):
            if x.device == device:
                x.record_stream(torch.cuda.current_stream(device))
