"""The start noise of a pipeline of diffusers, drawn by seed and sample id.

A pipeline draws its start noise with `randn_tensor`, a function that its module imports by this name. The draw may be
in prepare_latents or in __call__, before or after set_timesteps, and in any shape. While an accelerated pipeline runs,
`randn_tensor` of its module is replaced by a function that checks its caller. For calls from other threads, and for
calls with a generator or a sparse layout, the replacement calls diffusers' function.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.integrations.acceleration import Acceleration
from ddpm_ext.ops.noise import randn

NAME = "randn_tensor"
# Image-to-image pipelines start from latents that diffusers' module of autoencoders draws, by the same function.
OF_VAES = "diffusers.models.autoencoders.vae"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_drawn_by: ContextVar[Acceleration | None] = ContextVar("_drawn_by", default=None)
_lock = threading.Lock()
# {name of a module: the number of running calls of pipelines that use the replaced randn_tensor of the module}
_calls: dict[str, int] = {}


@contextlib.contextmanager
def start_noise(pipeline: Any, settings: Sequence[Acceleration]) -> Iterator[None]:
    """Wraps a call of a pipeline. The call begins a loop of each scheduler of the pipeline that has noise "philox".

    Noise that the pipeline draws without a generator comes from the first scheduler with noise "philox", if there is
    one: it is the start noise of this scheduler's loop.

    Args:
        settings: the settings of the pipeline's schedulers.
    """
    philox = [acceleration for acceleration in settings if acceleration.noise == "philox"]
    token = _drawn_by.set(philox[0] if philox else None)
    with contextlib.ExitStack() as stack:
        stack.callback(_drawn_by.reset, token)
        for acceleration in philox:
            stack.enter_context(acceleration.within_call())
        for module in _modules_of(pipeline) if philox else []:
            stack.enter_context(_replaced(module))
        yield


def _modules_of(pipeline: Any) -> list[ModuleType]:
    """The modules in which the pipeline may draw: OF_VAES, and those of its classes and a modular pipeline's blocks."""
    classes, blocks = list(type(pipeline).__mro__), [vars(pipeline).get("_blocks")]
    while blocks:
        block = blocks.pop()
        classes += type(block).__mro__
        blocks += getattr(block, "sub_blocks", {}).values()
    names = dict.fromkeys([OF_VAES, *(cls.__module__ for cls in classes)])
    return [sys.modules[name] for name in names if NAME in vars(sys.modules.get(name, object))]


@contextlib.contextmanager
def _replaced(module: ModuleType) -> Iterator[None]:
    """Replaces a module's `randn_tensor` by that of _checking_caller, which draws by seed and sample id.

    Calls of pipelines that overlap, also from several threads, share one replacement. The last to end removes it.
    """
    name = module.__name__
    with _lock:
        if not _calls.get(name):
            setattr(module, NAME, _checking_caller(getattr(module, NAME)))
        _calls[name] = _calls.get(name, 0) + 1
    try:
        yield
    finally:
        with _lock:
            _calls[name] -= 1
            if not _calls[name]:
                current = getattr(module, NAME)
                setattr(module, NAME, getattr(current, "__wrapped__", current))


def _checking_caller(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A `randn_tensor` that draws by seed and sample id in calls of accelerated pipelines, otherwise by `original`."""

    @functools.wraps(original)
    def randn_tensor(
        shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
    ) -> Tensor:
        settings = _drawn_by.get()
        if settings is None or generator is not None or layout not in (None, torch.strided):
            return original(shape, generator=generator, device=device, dtype=dtype, layout=layout)
        device, dtype = torch.device(device or "cpu"), dtype or torch.get_default_dtype()
        rng = settings.rng_of_start(shape[0])
        drawn_on = device if device.type in ("cpu", "cuda") else "cpu"
        z = randn(tuple(map(int, shape)), rng, device=drawn_on, dtype=dtype if dtype in DTYPES else torch.float32)
        return z.to(device, dtype)

    return randn_tensor
