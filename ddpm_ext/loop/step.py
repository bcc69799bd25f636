"""One step of a sampling loop: what the model is asked, and the launch that takes its answer over the samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.types import Clip, Model
from ddpm_ext.loop.guidance import Guidance
from ddpm_ext.loop.inpaint import Inpaint
from ddpm_ext.loop.rows import Kind, LoopTables
from ddpm_ext.ops.noise import Philox
from ddpm_ext.process.clip import DynamicThreshold
from ddpm_ext.process.model_output import split_variance, unwrap

__all__ = ["State", "StepOptions", "Stepper"]


@dataclass(frozen=True)
class StepOptions:
    """What a step does beside its row. See GaussianDiffusion.p_sample_loop, whose options have the same names.

    hand_out: whether a step hands out x0. learned: whether the model's output has twice the channels.
    """

    clip: Clip | None = (-1.0, 1.0)
    threshold: DynamicThreshold | None = None
    guidance: Guidance | None = None
    cond_fn: Callable[..., Tensor] | None = None
    denoised_fn: Callable[[Tensor], Tensor] | None = None
    inpaint: Inpaint | None = None
    self_condition: bool = False
    hand_out: bool = False
    learned: bool = False
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    autocast: torch.dtype | None = None

    @property
    def doubled(self) -> bool:
        """Whether the model gets the batch twice."""
        return self.guidance is not None and self.guidance.unconditional is None and self.guidance.scale != 1


class Samples(NamedTuple):
    """A buffer: x, and where the model gets the batch twice a copy of it right behind, with it in `whole`."""

    whole: Tensor
    x: Tensor
    copy: Tensor | None


class State:
    """The buffers that a loop goes on in: samples and their x0 twice, so that a step reads one and writes the other."""

    def __init__(self, x: Tensor, options: StepOptions, tables: LoopTables) -> None:
        self.batch = batch = len(x)
        first = torch.cat([x, x] if options.doubled else [x])
        wholes = (first, torch.empty_like(first))  # no views where they are not needed: each would cost every step
        self._x = [
            Samples(whole, whole[:batch], whole[batch:]) if options.doubled else Samples(whole, whole, None)
            for whole in wholes
        ]
        keeps_x0 = options.hand_out or options.self_condition or bool((tables.steps.c3 != 0).any())
        self._x0 = [torch.zeros_like(x), torch.zeros_like(x)] if keeps_x0 else None
        self.scratch = torch.empty_like(x) if options.threshold or options.denoised_fn else None
        self._first_turn = list(self._x), None if self._x0 is None else list(self._x0)

    @property
    def x(self) -> Tensor:
        return self._x[0].x

    @property
    def x_twice(self) -> Tensor:
        return self._x[0].whole

    @property
    def x0(self) -> Tensor | None:
        """Of the last step that asked the model."""
        return None if self._x0 is None else self._x0[0]

    @property
    def next_x(self) -> Tensor:
        return self._x[1].x

    @property
    def next_copy(self) -> Tensor | None:
        return self._x[1].copy

    @property
    def next_x0(self) -> Tensor | None:
        return None if self._x0 is None else self._x0[1]

    @property
    def turn(self) -> tuple[int, int]:
        """Which of the buffers are read from."""
        return self.x.data_ptr(), 0 if self._x0 is None else self._x0[0].data_ptr()

    def advance(self, kind: Kind) -> None:
        self._x.reverse()
        if self._x0 is not None and kind.asks:
            self._x0.reverse()

    def rewind(self) -> None:
        """As before the first step, but for what is in the buffers."""
        x, x0 = self._first_turn
        self._x, self._x0 = list(x), None if x0 is None else list(x0)

    def restart(self, x: Tensor) -> None:
        """From new samples, in the same buffers."""
        self.rewind()
        for half in (self._x[0].x, self._x[0].copy):
            if half is not None:
                half.copy_(x)
        if self._x0 is not None:
            self._x0[0].zero_()


def _has_rows(value: object, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows


class Stepper:
    """Takes a loop's rows one by one. All that it needs beside what the model makes is allocated before the first."""

    def __init__(
        self, backend: ModuleType, model: Model, tables: LoopTables, x: Tensor, rng: Philox, options: StepOptions
    ) -> None:
        self.backend, self.model, self.options = backend, model, options
        self.tables, self.rng = tables, rng
        self.state = State(x, options, tables)
        dtype = checks.compute_dtype(x.dtype)
        self._rows, self._extended, self._x0_rows = (
            tables.device.get(name, x.device, dtype) for name in ("steps", "extended", "x0")
        )
        self._constant: dict[str, Any] = {}
        if options.inpaint is not None:
            self._constant["known"], self._constant["mask"] = options.inpaint.tensors(x)
        self._has_history = bool((tables.steps.c3 != 0).any())
        # of what is there for both halves of a batch that the model gets twice, m's half, where it is asked for m alone
        self._single_kwargs = {
            name: value[len(x) :] if options.doubled and _has_rows(value, 2 * len(x)) else value
            for name, value in options.model_kwargs.items()
        }
        self._plain = not (
            self._constant
            or options.doubled
            or any(kind.guided for kind in tables.kinds)
            or options.cond_fn is not None
            or self.state.scratch is not None
            or self.state.x0 is not None
            or tables.variance is not None
            or tables.steps.extended
        )

    def take(self, kind: Kind, at: int | Tensor, t: Tensor) -> None:
        """One row: `at`, an int or int64 (batch,), is its number, t the timesteps that the model is told, (batch,), or
        twice that where it gets the batch twice. The state's `advance` belongs after it."""
        state, options = self.state, self.options
        x, moments = state.x, t[: state.batch] if options.doubled else t
        if self._plain and kind.asks:
            model_output = self._prediction(self._ask(self.model, x, moments, **options.model_kwargs))
            self.backend.reverse_step(
                x, model_output, self._rows, at, clip=options.clip, rng=self.rng, out=state.next_x
            )
            return

        extras = dict(self._constant)
        if kind.asks:
            needed = self._x_start(kind, at, self._outputs(kind, t, extras), extras)
            if options.cond_fn is not None:
                extras["gradient"] = options.cond_fn(x, moments, **self._single_kwargs)
                checks.like("what cond_fn returns", extras["gradient"], "x_t", x)
            if self._has_history:
                extras["history"] = state.x0
            extras["x0_out"] = state.next_x0
        else:
            needed = None
        self.backend.extended_step(
            x,
            needed,
            self._extended,
            at,
            clip=options.clip,
            rng=self.rng,
            out=state.next_x,
            out_copy=state.next_copy,
            **extras,
        )

    def _ask(self, model: Model, x: Tensor, t: Tensor, **model_kwargs: Any) -> Tensor:
        options = self.options
        known_x0 = (self.state.x0,) if options.self_condition else ()
        with self._autocast(x):
            return unwrap(model(x, t, *known_x0, **model_kwargs))

    def _autocast(self, x: Tensor) -> AbstractContextManager[Any]:
        if self.options.autocast is None:
            return nullcontext()
        return torch.autocast(x.device.type, self.options.autocast, cache_enabled=False)

    def _prediction(self, model_output: Tensor) -> Tensor:
        return split_variance(self.state.x, model_output)[0] if self.options.learned else model_output

    def _outputs(self, kind: Kind, t: Tensor, extras: dict[str, Any]) -> Tensor:
        """The model's output; what belongs to it goes to `extras`."""
        state, options = self.state, self.options
        x, moments, guidance = state.x, t[: state.batch] if options.doubled else t, options.guidance
        uncond_output = None
        if not kind.guided or guidance is None:
            model_output = self._ask(self.model, x, moments, **self._single_kwargs)
        elif guidance.unconditional is None:
            both = self._ask(self.model, state.x_twice, t, **options.model_kwargs)
            if len(both) != 2 * state.batch:
                raise ValueError(
                    f"the model's output has {len(both)} samples, expected {2 * state.batch}: guidance without a "
                    "function for the unconditional output gives it the batch twice"
                )
            uncond_output, model_output = both[: state.batch], both[state.batch :]
        else:
            model_output = self._ask(self.model, x, moments, **options.model_kwargs)
            uncond_output = self._ask(guidance.unconditional, x, moments)
        if options.learned:
            model_output, variance = split_variance(x, model_output)
            if self.tables.variance is not None:
                extras |= {"model_variance": variance, "log_variance": self.tables.variance == "log"}
        if uncond_output is not None and guidance is not None:
            uncond_output = self._prediction(uncond_output)
            checks.like("uncond_output", uncond_output, "x_t", x, lower=True)
            checks.like("model_output", model_output, "x_t", x, lower=True)
            extras |= {
                "uncond_output": uncond_output,
                "output_scale": guidance.output_scale(model_output, uncond_output),
            }
        return model_output

    def _x_start(self, kind: Kind, at: int | Tensor, model_output: Tensor, extras: dict[str, Any]) -> Tensor | None:
        """Where x0 must be seen before the step: it goes to `extras`, and what is returned of the output is still
        needed."""
        state, options = self.state, self.options
        if state.scratch is None:
            return model_output
        guided = {name: extras[name] for name in ("uncond_output", "output_scale") if name in extras}
        x_start = self.backend.extended_step(
            state.x, model_output, self._x0_rows, at, clip=None, add_noise=False, out=state.scratch, **guided
        )
        if options.denoised_fn is not None:
            x_start = options.denoised_fn(x_start)
            checks.like("what denoised_fn returns", x_start, "x_t", state.x)
        if options.threshold is not None:
            extras["x_start_scale"] = options.threshold.x_start_scale(x_start)
        extras["x_start"] = x_start
        if kind.keeps:
            return model_output
        for name in guided:
            del extras[name]
        return None
