"""Tensors in guarded memory, which detects accesses out of bounds: between protected pages, and among canaries."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

# The 16 bits that fill the memory around a tensor. They are NaN as float16 and as bfloat16, and two of them are NaN as
# float32. So a read out of bounds makes a result NaN.
CANARY = torch.tensor([0xFFC1 - 0x10000], dtype=torch.int16)
PLACES = ("front", "odd", "middle", "back")

_PROTECTION = {"none": 0, "read_write": 3}
_PRIVATE, _ANONYMOUS, _NORESERVE = 0x02, 0x20, 0x4000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def reserve(size: int, protection: str) -> int:
    """The address of `size` bytes of new pages. A page takes memory only after its first access."""
    flags = _PRIVATE | _ANONYMOUS | _NORESERVE
    address = _libc.mmap(None, size, _PROTECTION[protection], flags, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"mmap of {size} bytes: errno {ctypes.get_errno()}")
    return address


def tensor_at(address: int, size: int) -> Tensor:
    """A uint8 tensor of the `size` bytes at an address. The memory is never freed."""
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


class Sparse:
    """Address space for more float32 elements than fit into memory. Pages that are not accessed take no memory."""

    def __init__(self, numel: int) -> None:
        self.bytes = tensor_at(reserve(4 * numel, "read_write"), 4 * numel)

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int], offset: int) -> Tensor:
        return self.bytes.view(dtype).as_strided(shape, strides, offset)


def extent(tensor: Tensor) -> int:
    """The number of elements that the memory from a tensor's first element to its last element can hold."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


class Pages:
    """Whole pages between two protected pages."""

    def __init__(self, size: int) -> None:
        self.size = size
        address = reserve(size + 2 * mmap.PAGESIZE, "none")
        self.address = address + mmap.PAGESIZE
        if _libc.mprotect(self.address, size, _PROTECTION["read_write"]) != 0:
            raise MemoryError(f"mprotect: errno {ctypes.get_errno()}")
        self.bytes = tensor_at(self.address, size)


class Placed:
    """A copy of a tensor in guarded memory, with the same strides.

    place: where the tensor begins in its pages: "front" at the first byte, which is aligned to 128 bits; "odd" one
        element later; "middle" 64 bits later. With "back", the tensor ends at the last byte.
    """

    _free: dict[int, list[Pages]] = {}  # noqa: RUF012

    def __init__(self, values: Tensor, place: str, control: ModuleType) -> None:
        self.control = control
        item, size = values.element_size(), extent(values) * values.element_size()
        whole = -(-(size + 8) // mmap.PAGESIZE) * mmap.PAGESIZE
        free = self._free.setdefault(whole, [])
        self.pages = free.pop() if free else Pages(whole)
        self.pages.bytes.view(torch.int16).copy_(CANARY)
        self.begin = {"front": 0, "odd": item, "middle": 8, "back": whole - size}[place]
        self.end = self.begin + size
        memory = self.pages.bytes[self.begin : self.begin + max(size, item)].view(values.dtype)
        self.tensor = memory.as_strided(values.shape, values.stride())
        self.expanded = any(n > 1 and stride == 0 for n, stride in zip(values.shape, values.stride(), strict=True))
        if self.expanded:
            narrow = [slice(0, 1) if stride == 0 else slice(None) for stride in values.stride()]
            self.tensor[tuple(narrow)] = values[tuple(narrow)]
        else:
            self.tensor.copy_(values)
        self.before = self.pages.bytes.clone()
        self.poison(True)

    def poison(self, on: bool) -> None:
        call = self.control.poison if on else self.control.unpoison
        call(self.pages.address, self.begin)
        call(self.pages.address + self.end, self.pages.size - self.end)

    def done(self, written: bool) -> Tensor:
        """Returns the tensor's values, and releases the pages for reuse.

        Asserts that the memory around the tensor is unchanged. `written` says whether the kernel should have written to
        the tensor. If not, asserts that the tensor is unchanged, too.
        """
        self.poison(False)
        result = self.tensor.clone()
        if written and result.numel() > 0:
            bits = torch.int32 if result.element_size() == 4 else torch.int16
            before = self.before[self.begin : self.end].view(bits).as_strided(result.shape, self.tensor.stride())
            self.tensor.view(bits).copy_(before)
        assert torch.equal(self.pages.bytes, self.before), "memory was written that should not have been"
        self._free[self.pages.size].append(self.pages)
        return result
