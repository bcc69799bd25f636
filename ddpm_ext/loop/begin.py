"""What happens before a sampling loop: checks of the model, torch.compile, and the samples before the first step."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.types import Model
from ddpm_ext.loop.interpolation import Interpolation
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import LoopRows
from ddpm_ext.ops.noise import STREAM_START, Philox, is_differentiated


def check_model(model: object) -> None:
    """Raises TypeError if the model is not callable, and NotImplementedError where no loop can run.

    No loop can run in torch.jit.trace, or in a derivative by torch.func.
    """
    if not callable(model):
        raise TypeError(f"model is {model!r}, expected a function")
    if torch.compiler.is_compiling():
        return
    if torch._C._is_tracing():
        raise NotImplementedError("a sampling loop: torch.jit.trace cannot record it, expected single steps (p_sample)")
    if is_differentiated():
        raise NotImplementedError(
            "a sampling loop: torch.func takes a derivative, expected none, or single steps (p_sample) with "
            "backend='reference'"
        )


def compiled(model: Model, mode: bool | str, device: torch.device) -> Model:
    """The model, compiled by torch.compile unless `mode` is False. mode: p_sample_loop's option `compile`."""
    if isinstance(mode, str) or mode is True:
        _check_compiler(mode, device)
    if isinstance(mode, str):
        try:
            return torch.compile(model, mode=mode)
        except RuntimeError as error:
            raise ValueError(f"compile is {mode!r}, expected a bool or a mode of torch.compile: {error}") from None
    if not isinstance(mode, bool):
        raise TypeError(f"compile is {mode!r}, expected a bool or a mode of torch.compile")
    return torch.compile(model) if mode else model


def _check_compiler(mode: bool | str, device: torch.device) -> None:
    """Raises ValueError if torch.compile needs a C++ compiler, as on a CPU, and finds none.

    Without this check, torch.compile would fail in the first step, with pages of errors.
    """
    if device.type != "cpu":
        return
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler
    except ImportError:  # these are private names, which a version of torch may not have
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError(f"compile is {mode!r}, expected False: torch.compile finds no C++ compiler here") from None


def rng_in_memory(rng: Philox, batch: int, device: torch.device) -> Philox:
    """A Philox with the same noise. Its seed and sample ids are new tensors, which the replays of a CUDA graph read."""
    seed = torch.tensor(rng.seed_value, device=device) if rng.seed is None else rng.seed
    ids = rng.sample_ids
    if ids is None:
        ids = torch.arange(rng.first_id, rng.first_id + batch, device=device)
    return Philox(seed.to(device, copy=True), ids.to(device, copy=True))


class InitialSamples:
    """Makes the samples before a loop's first step.

    Args:
        ops: the module of the process's operators, ops.fused or ops.reference.
        model, shape, options: see p_sample_loop.
        rows: the rows of the loop.
    """

    def __init__(
        self, ops: ModuleType, model: Model, shape: tuple[int, ...], rows: LoopRows, options: LoopOptions
    ) -> None:
        self._ops, self._rows = ops, rows
        self._shape, self._dtype = checks.shape(shape, least=1), options.dtype
        self.device = _device(options, model)

    def samples(self, rng: Philox, start: Tensor | Interpolation | None, noise: Tensor | None) -> Tensor:
        """The samples before the first step: drawn noise, or `noise`, or `start` with noise at the first step's level.

        Raises:
            TypeError, ValueError: start or noise has a wrong type, shape, dtype or device; both are given; or start is
                given with a table whose first level is unknown.
        """
        if start is not None and noise is not None:
            raise ValueError("noise and start are both given, expected one of them")
        if noise is not None:
            self._check("noise", noise)
            return noise
        if start is None:
            drawn = self._ops.randn(self._shape, rng.of(STREAM_START, 0), device=self.device, dtype=self._dtype)
            return drawn if self._rows.pure_noise == 1 else drawn.mul_(self._rows.pure_noise)
        images = (start.first, start.second) if isinstance(start, Interpolation) else (start,)
        noised = []
        for draw, image in enumerate(images):
            self._check("start", image)
            levels = self._rows.device.find("start", image.device, checks.compute_dtype(self._dtype))
            if levels is None:
                raise ValueError(
                    "start is given with a sampler whose table has neither the levels signal_now and noise_now nor the "
                    "schedule's timesteps, expected a table that has them, or a sampler's name"
                )
            with torch.no_grad():
                noised.append(self._ops.forward_process(image, levels, 0, rng=rng.of(STREAM_START, draw)))
        return start.mix(*noised) if isinstance(start, Interpolation) else noised[0]

    def _check(self, name: str, tensor: object) -> None:
        checks.tensor(name, tensor)
        assert isinstance(tensor, Tensor)
        if tensor.shape != self._shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {self._shape}")
        if tensor.dtype != self._dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected that of the samples, {self._dtype}")
        if tensor.device != self.device:
            raise ValueError(f"{name} is on {tensor.device}, expected the samples' device, {self.device}")


def _device(options: LoopOptions, model: Any) -> torch.device:
    """The option `device`. Without it, the device of start or noise, else of the model's parameters, else the CPU."""
    if options.device is not None:
        return checks.device(options.device)
    image = options.noise if options.start is None else options.start
    image = image.first if isinstance(image, Interpolation) else image
    if isinstance(image, Tensor):
        return image.device
    parameters = getattr(model, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return torch.device("cpu") if first is None else first.device
