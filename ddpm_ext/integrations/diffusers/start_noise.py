"""The noise that a pipeline of diffusers starts from, by seed and sample id.

Pipelines draw it by `randn_tensor`, each by the name in its own module: in prepare_latents or __call__, before or after
set_timesteps, in the shape that they pack. While an accelerated pipeline is called, that name is a function which looks
who calls: in other threads, and wherever a generator is given, it is diffusers' own.
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
OF_VAES = "diffusers.models.autoencoders.vae"  # draws an image's latents, from which image to image starts
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_drawn_by: ContextVar[Acceleration | None] = ContextVar("_drawn_by", default=None)
_lock = threading.Lock()
_calls: dict[str, int] = {}  # that are under way, by the module's name


@contextlib.contextmanager
def start_noise(pipeline: Any, settings: Sequence[Acceleration]) -> Iterator[None]:
    """A call of a pipeline whose schedulers have these settings: one loop, or several, which begin here.

    With noise "philox", the pipeline's own draws without a generator are the start noise of the first scheduler's.
    """
    philox = [each for each in settings if each.noise == "philox"]
    token = _drawn_by.set(philox[0] if philox else None)
    with contextlib.ExitStack() as stack:
        stack.callback(_drawn_by.reset, token)
        for each in philox:
            stack.enter_context(each.within_call())
        for module in _modules_of(pipeline) if philox else []:
            stack.enter_context(_replaced(module))
        yield


def _modules_of(pipeline: Any) -> list[ModuleType]:
    """Those that draw: of its class's ancestors, and of a modular pipeline's blocks."""
    classes, blocks = list(type(pipeline).__mro__), [vars(pipeline).get("_blocks")]
    while blocks:
        block = blocks.pop()
        classes += type(block).__mro__
        blocks += getattr(block, "sub_blocks", {}).values()
    names = dict.fromkeys([OF_VAES, *(cls.__module__ for cls in classes)])
    return [sys.modules[name] for name in names if NAME in vars(sys.modules.get(name, object))]


@contextlib.contextmanager
def _replaced(module: ModuleType) -> Iterator[None]:
    """Several calls, also in several threads, share what is in the place of diffusers' function."""
    name = module.__name__
    with _lock:
        if not _calls.get(name):
            setattr(module, NAME, _looking(getattr(module, NAME)))
        _calls[name] = _calls.get(name, 0) + 1
    try:
        yield
    finally:
        with _lock:
            _calls[name] -= 1
            if not _calls[name]:
                current = getattr(module, NAME)
                setattr(module, NAME, getattr(current, "__wrapped__", current))


def _looking(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(own)
    def randn_tensor(
        shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
    ) -> Tensor:
        settings = _drawn_by.get()
        if settings is None or generator is not None or layout not in (None, torch.strided):
            return own(shape, generator=generator, device=device, dtype=dtype, layout=layout)
        device, dtype = torch.device(device or "cpu"), dtype or torch.get_default_dtype()
        rng = settings.rng_of_start(shape[0])
        at = device if device.type in ("cpu", "cuda") else "cpu"
        z = randn(tuple(map(int, shape)), rng, device=at, dtype=dtype if dtype in DTYPES else torch.float32)
        return z.to(device, dtype)

    return randn_tensor
