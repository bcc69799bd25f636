"""Two pretended GPUs ("cards") whose tensors have values. The tensors are in the CPU's memory, and CPU kernels compute.

`install` replaces torch.cuda for the whole process, before the process uses it. Then Python sees the result of
`torch.zeros(3, device="cuda")` as a GPU tensor. torch's C++ sees a CPU tensor, whose storage has a mark. The pretended
card raises errors for what a GPU refuses:

- operators on tensors of different devices;
- in a graph capture (fake_cuda.graph): everything that makes the host wait, copies of host memory that is not pinned,
  pinning memory, and allocations for another stream than the captured stream;
- while torch.cuda.set_sync_debug_mode is "error": everything that makes the host wait;
- in a forked process: any use of the card, if the parent process has used it, and backward passes, if the parent
  process has run one.

Operators are synchronous. Times come from the host's clock and say nothing about a real card.
"""

from __future__ import annotations

import contextlib
import math
import os
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from support import fake_cuda
from support.fake_cuda import Current, refuse_in_a_capture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAME, CARDS, CAPABILITY = "pretended card", 2, (9, 0)
MEMORY = 2**30  # bytes of each card; a card does not refuse larger allocations
# The operators that make the host wait for the card. Copies and indices of the host are treated in Operators.check.
WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")
# torch's own attributes and methods of Tensor, which `install` replaces.
PLAIN = {name: getattr(Tensor, name) for name in ("device", "is_cpu", "is_cuda", "to", "tolist", "numpy")}

GROUPED = torch._C._group_tensors_by_device_and_dtype


class Host:
    """The state of the cards in this process."""

    index = 0  # the current card's number
    passing: int | None = None  # the card of a running backward pass, whose new tensors C++ creates on the CPU
    sync_debug = "default"
    used = ran_backward = forked_after_use = forked_after_backward = False
    blocks = size = in_use = 0  # the number of allocations, their bytes, and the bytes that are not freed yet

    @classmethod
    def fork(cls) -> None:
        cls.forked_after_use, cls.forked_after_backward = cls.used, cls.ran_backward

    @classmethod
    def use(cls, *_: Any) -> bool:
        if cls.forked_after_use:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
        cls.used = True
        return True

    @classmethod
    def allocate(cls, storage: torch.UntypedStorage) -> None:
        if Current.captures and Current.stream is not Current.captured:
            refuse_in_a_capture("cudaMalloc for a stream that is not captured")
        size = math.ceil(storage.nbytes() / 512) * 512
        cls.blocks, cls.size, cls.in_use = cls.blocks + bool(size), cls.size + size, cls.in_use + size
        weakref.finalize(storage, cls.free, size)

    @classmethod
    def free(cls, size: int) -> None:
        cls.in_use -= size

    @classmethod
    def wait(cls, what: str) -> None:
        """Raises an error where the host must not wait for a card. `what` says what makes it wait."""
        refuse_in_a_capture(what)
        if cls.sync_debug == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")


def mark(x: Any, name: str) -> Any:
    """A mark of a tensor's storage, or None. "card" is the number of its card. "pinned" says that it is pinned."""
    try:
        return getattr(x.untyped_storage(), name, None)
    except (AttributeError, NotImplementedError, RuntimeError):  # x is no tensor, or has no storage
        return None


def card_of(x: Any) -> int | None:
    """The number of a tensor's card, or None if it is on the host."""
    return mark(x, "card")


def index_of(device: Any) -> int | None:
    """The number of the card that a device names, or None for other devices."""
    as_device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cpu")
    return None if as_device.type != "cuda" else Host.index if as_device.index is None else as_device.index


# ----------------------------------------------------------------------------- attributes and methods of Tensor


def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.to, which in C++ would ask the driver for the current card."""
    copy = kwargs.pop("copy", False)
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    layout = layout or torch.preserve_format
    if device is None or (device.type in ("cpu", "cuda") and index_of(device) == card_of(self)):
        return PLAIN["to"](self, dtype or self.dtype, copy=copy, memory_format=layout)
    # A copy to the host asks for "cpu:0". Plain "cpu" is what C++ autograd passes for the device of a card's tensor, so
    # Operators takes it for the card.
    device = torch.device(device.type, index_of(device) or 0) if device.type in ("cpu", "cuda") else device
    copy_options = {"dtype": dtype, "non_blocking": non_blocking, "memory_format": layout}
    return torch.ops.aten._to_copy(self, device=device, **copy_options)


def numpy(self: Tensor, *args: Any, **kwargs: Any) -> Any:
    if card_of(self) is not None and kwargs.get("force"):
        return numpy(self.detach().cpu())
    if card_of(self) is not None:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu()")
    return PLAIN["numpy"](self, *args, **kwargs)


def device(self: Tensor) -> torch.device:
    return PLAIN["device"].__get__(self) if card_of(self) is None else torch.device("cuda", card_of(self))


TENSOR = {
    "device": property(device),
    "is_cuda": property(lambda self: card_of(self) is not None),
    "is_cpu": property(lambda self: card_of(self) is None and PLAIN["is_cpu"].__get__(self)),
    "to": to,
    "cpu": lambda self, memory_format=torch.preserve_format: to(self, "cpu", memory_format=memory_format),
    "cuda": lambda self, device=None, non_blocking=False: to(self, device or "cuda", non_blocking=non_blocking),
    "tolist": lambda self: PLAIN["tolist"](self.cpu()),
    "numpy": numpy,
    "record_stream": lambda self, stream: None,  # does nothing, since operators are synchronous
}


def through_the_host(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wraps torch.tensor or torch.as_tensor, which create a tensor on the host and copy it to the card.

    Dispatch modes do not see torch's own copy. They see the copy by `to`, which replaces it here.
    """

    def make(data: Any, *, device: Any = None, requires_grad: bool = False, **options: Any) -> Tensor:
        result = function(data, **options)
        result = result if device is None else result.to(device)
        return result.requires_grad_() if requires_grad else result

    return make


# ------------------------------------------------------------------------------------------------- operators


class Operators(TorchDispatchMode):
    """A dispatch mode for the whole process. It runs a card's operators by CPU kernels, and marks their results."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), function._schema.name.partition("::")[2]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        cards = {index for x in inputs if (index := card_of(x)) is not None}
        device, pinned = kwargs.get("device"), kwargs.get("pin_memory")
        card = next(iter(cards), None) if device is None else index_of(device)
        if device == torch.device("cpu") and (name == "_to_copy" or Host.passing is not None):  # see `to`
            card = next(iter(cards), None if inputs else Host.passing)
        if name == "is_pinned":
            return bool(mark(args[0], "pinned"))
        if not cards and card is None:
            if name == "_pin_memory":
                function, kwargs, pinned = torch.ops.aten.clone.default, {}, True
            if pinned:
                refuse_in_a_capture("cudaHostAlloc")
                kwargs.pop("pin_memory", None)
            result = function(*args, **kwargs)
            if pinned:
                result.untyped_storage().pinned = True
            return result
        Host.use()
        self.check(name, args, kwargs, inputs, cards, card)
        if device is not None and card is not None:
            kwargs["device"] = torch.device("cpu")
        result = function(*args, **kwargs)
        input_storages = {x.untyped_storage()._cdata for x in inputs}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and card is not None and x.untyped_storage()._cdata not in input_storages:
                x.untyped_storage().card = card
                Host.allocate(x.untyped_storage())
        return result

    def check(self, name: str, args: Any, kwargs: Any, inputs: list[Tensor], cards: set[int], card: int | None) -> None:
        """Raises the error that a GPU would raise for this call, if there is one."""
        of_host = [x for x in inputs if card_of(x) is None]
        if name in WAITS:
            Host.wait(name)
        if name in ("_to_copy", "copy_"):
            source, result = (args[0], card) if name == "_to_copy" else (args[1], card_of(args[0]))
            if (card_of(source) is None) == (result is None):
                return
            if not kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False):
                Host.wait(f"{name} between the host and a card, without non_blocking")
            memory = source if result is not None else args[0] if name == "copy_" else None
            if not mark(memory, "pinned"):
                refuse_in_a_capture("a copy of memory of the host that is not pinned")
        elif name.startswith(("index", "_index_put")) and of_host:
            Host.wait(f"{name} by indices of the host")
        elif len(cards) > 1 or (cards and any(x.dim() for x in of_host)):
            devices = ", ".join(sorted({str(x.device) for x in inputs}))
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {devices}")


# ------------------------------------------------------------------------------------------------ torch.cuda


def synchronize(device: Any = None) -> None:
    Host.use()
    fake_cuda.end_wait("cudaDeviceSynchronize")


@contextlib.contextmanager
def current(device: Any) -> Iterator[None]:
    before, index = Host.index, index_of(device)
    Host.index = before if index is None else index
    try:
        yield
    finally:
        Host.index = before


def properties(device: Any = None) -> SimpleNamespace:
    Host.use()
    about = {"name": NAME, "uuid": "pretended", "multi_processor_count": 132, "L2_cache_size": 2**15}
    return SimpleNamespace(**about, major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=MEMORY)


CUDA: dict[str, Any] = fake_cuda.FAKES | {
    "_lazy_init": Host.use,
    "init": Host.use,
    "is_available": Host.use,  # since it asks the driver
    "is_initialized": lambda: Host.used,
    "is_current_stream_capturing": lambda: Current.captures,
    "device_count": lambda: CARDS * Host.use(),
    "current_device": lambda: Host.index,
    "set_device": lambda device: setattr(Host, "index", index_of(device)),
    "device": current,
    "get_device_properties": properties,
    "get_device_capability": lambda device=None: CAPABILITY,
    "get_device_name": lambda device=None: NAME,
    "synchronize": synchronize,
    "empty_cache": lambda: None,
    "mem_get_info": lambda device=None: (MEMORY, MEMORY),
    "memory_stats": lambda device=None: {
        "allocation.all.allocated": Host.blocks,
        "allocated_bytes.all.allocated": Host.size,
    },
    "memory_allocated": lambda device=None: Host.in_use,
    "get_sync_debug_mode": lambda: Host.sync_debug,
    "set_sync_debug_mode": lambda mode: setattr(Host, "sync_debug", mode),
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
}


def grouped(lists: Any, *options: Any) -> dict[Any, Any]:
    """torch._C._group_tensors_by_device_and_dtype, with the devices that Python sees.

    Optimizers call it to group their tensors. C++ takes all of them for CPU tensors, so each of its groups has one
    dtype, and its device is replaced by that of the group's first tensor. This is in the first list, which has no None.
    """
    groups = GROUPED(lists, *options)
    return {(group[0][0][0].device, dtype): group for (_, dtype), group in groups.items()}


def install() -> None:
    """Replaces torch.cuda, and what else shows the card, in this process. It cannot be undone."""
    engine = torch.autograd._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:  # args[0]: the tensors that the pass starts from
        if Host.forked_after_backward:
            raise RuntimeError("Unable to handle autograd's threading in combination with fork-based multiprocessing")
        Host.ran_backward, Host.passing = True, card_of(args[0][0])
        try:
            return engine(*args, **kwargs)
        finally:
            Host.passing = None

    os.register_at_fork(after_in_child=Host.fork)
    fakes = (
        (torch.cuda, CUDA),
        (Tensor, TENSOR),
        (torch, {name: through_the_host(getattr(torch, name)) for name in ("tensor", "as_tensor")}),
        (torch.autograd, {"_engine_run_backward": backward}),
        (torch.accelerator, {"current_stream": lambda device=None: Current.stream}),
        (torch._C, {"_cuda_getCurrentRawStream": lambda index: id(Current.stream), GROUPED.__name__: grouped}),
    )
    for owner, names in fakes:
        for name, fake in names.items():
            setattr(owner, name, fake)
    Operators().__enter__()
