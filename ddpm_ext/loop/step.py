"""One step of a sampling loop: the call of the model, and the launch that makes the next samples of its output."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.types import Model
from ddpm_ext.loop.options import StepOptions
from ddpm_ext.loop.rows import LoopRows
from ddpm_ext.ops.noise import Philox
from ddpm_ext.ops.result_memory import empty_like
from ddpm_ext.process.model_output import split_variance, unwrap
from ddpm_ext.tables.row_kinds import RowKind

__all__ = ["LoopStep", "State"]


class Samples(NamedTuple):
    """A buffer of samples x. Where the model gets the batch twice, `copy` holds x again, and `whole` is both in one
    tensor; elsewhere `whole` is x, and `copy` None.
    """

    whole: Tensor
    x: Tensor
    copy: Tensor | None


def _twice(x: Tensor) -> Tensor:
    """x, and x again behind it: (2 batch, ...), in memory of the pool, which torch.cat does not have."""
    both = empty_like(x.expand(2, *x.shape))
    both.copy_(x)
    return both.flatten(0, 1)


class State:
    """A loop's buffers: two of the samples and two of the predicted clean samples, of which a step reads one and writes
    the other; and three tensors of history, of which the newest replaces the oldest.
    """

    def __init__(self, x: Tensor, options: StepOptions, rows: LoopRows) -> None:
        self.batch = batch = len(x)
        first = _twice(x) if options.doubled else torch.cat([x])
        wholes = (first, empty_like(first))
        # Views are made only where they are needed, since each would cost time at every step.
        self._x = [
            Samples(whole, whole[:batch], whole[batch:]) if options.doubled else Samples(whole, whole, None)
            for whole in wholes
        ]
        stores_x0 = options.x0 or options.self_condition or rows.reads_last_x0
        self._x0 = [torch.zeros_like(x), torch.zeros_like(x)] if stores_x0 else None
        self.scratch = empty_like(x) if options.denoised_fn is not None else None
        self._history = [torch.zeros_like(x) for _ in range(3)] if rows.table.linear else []
        self._first_order = list(self._x), None if self._x0 is None else list(self._x0), list(self._history)

    @property
    def x(self) -> Tensor:
        return self._x[0].x

    @property
    def x_twice(self) -> Tensor:
        return self._x[0].whole

    @property
    def x0(self) -> Tensor | None:
        """The predicted clean samples of the last step that called the model."""
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

    def history(self, kind: RowKind) -> dict[str, Tensor]:
        """What a row reads of what earlier rows kept, and where it writes what it keeps."""
        names = ("history1", "history2", "history3")
        tensors = {
            name: tensor for name, tensor, is_read in zip(names, self._history, kind.history, strict=True) if is_read
        }
        return tensors | {"history_out": self._history[2]} if kind.keeps else tensors

    @property
    def addresses(self) -> tuple[int, ...]:
        """Those of the buffers that the next step reads."""
        first = [buffers[0].data_ptr() for buffers in (self._x0, self._history) if buffers]
        return self.x.data_ptr(), *first

    def advance(self, kind: RowKind) -> None:
        """After a step: what it wrote is what the next one reads."""
        self._x.reverse()
        if self._x0 is not None and kind.calls_model:
            self._x0.reverse()
        if kind.keeps:
            self._history = [self._history[2], *self._history[:2]]

    def rewind(self) -> None:
        """Puts the buffers in the order that they had before the first step; their contents stay."""
        x, x0, history = self._first_order
        self._x, self._x0, self._history = list(x), None if x0 is None else list(x0), list(history)

    def restart(self, x: Tensor) -> None:
        """Begins again with new samples, in the same buffers."""
        self.rewind()
        for half in (self._x[0].x, self._x[0].copy):
            if half is not None:
                half.copy_(x)
        if self._x0 is not None:
            self._x0[0].zero_()


def _has_rows(value: object, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows


class LoopStep:
    """Takes a loop's steps one by one. All memory that it needs beside the model's is allocated before the first."""

    def __init__(
        self, ops: ModuleType, model: Model, rows: LoopRows, x: Tensor, rng: Philox, options: StepOptions
    ) -> None:
        self.ops, self.model, self.options = ops, model, options
        self.rows, self.rng = rows, rng
        guidance = options.guidance
        if (
            guidance is not None
            and guidance.rescale > 0
            and x.numel() < 2 * len(x)
            and any(k.guided for k in rows.kinds)
        ):
            raise ValueError(f"guidance rescale is {guidance.rescale}, expected 0 for samples of one element")
        self.state = State(x, options, rows)
        dtype = checks.compute_dtype(x.dtype)
        self._steps, self._extended, self._x0_rows, self._linear, self._unchanged = (
            rows.device.find(name, x.device, dtype) for name in ("steps", "extended", "x0", "linear", "unchanged")
        )
        self._constant: dict[str, Any] = {}
        if options.inpaint is not None:
            self._constant["known"], self._constant["mask"] = options.inpaint.tensors(x)
        self._reads_last_x0 = rows.reads_last_x0
        # For a call with a single batch: the conditional half of each doubled model_kwarg.
        self._single_kwargs = {
            name: value[len(x) :] if options.doubled_kwargs and _has_rows(value, 2 * len(x)) else value
            for name, value in options.model_kwargs.items()
        }
        self._plain = not (
            self._constant
            or options.doubled
            or any(kind.guided for kind in rows.kinds)
            or options.cond_fn is not None
            or options.threshold is not None
            or options.denoised_fn is not None
            or self.state.x0 is not None
            or rows.variance is not None
            or rows.table.extended
            or rows.table.linear
        )
        # A row without noise takes the kernels without: they have less to find out, and hold fewer registers.
        common = {"clip": options.clip, "timesteps": rows.device.timestep, "unwrap": unwrap}
        self._reverse_steps = {
            noisy: ops.ReverseStep(self._steps, **common, **self._noise(noisy))
            for noisy in {kind.noisy for kind in rows.kinds if self._plain}
        }
        brief = self._plain and all(kind.calls_model for kind in rows.kinds)
        brief = brief and not (options.autocast or options.learned)
        brief = brief and all(step.run is not None for step in self._reverse_steps.values())
        self._runs = [self._reverse_steps[kind.noisy].run for kind in rows.kinds] if brief else None
        self._run_model = partial(model, **self._single_kwargs) if self._single_kwargs else model

    @property
    def brief(self) -> bool:
        """Whether take_brief takes the steps, too."""
        return self._runs is not None

    def take_brief(self, row: int, t: Tensor) -> None:
        """As take, all in one call of the compiled module, which records no gradients."""
        assert self._runs is not None
        self._runs[row](self._run_model, self.state.x, row, self.state.next_x, t)

    def take(self, kind: RowKind, row: int | Tensor, t: Tensor) -> None:
        """One step.

        Args:
            kind: what the row needs of the model.
            row: its number, an int or int64 (batch,).
            t: the timesteps for the model, (batch,), or twice that where it gets the batch twice.

        The caller calls the state's `advance` afterwards.
        """
        if self._plain and kind.calls_model:
            return self._take_plain(kind, row, t)
        state, options = self.state, self.options
        x, inputs = state.x, dict(self._constant)
        still_read: Tensor | None = None
        if kind.calls_model:
            still_read = self._x_start(kind, row, self._outputs(kind, t, inputs), inputs)
            if options.cond_fn is not None:
                inputs["gradient"] = options.cond_fn(x, self._once_a_sample(t), **self._single_kwargs)
                checks.like("what cond_fn returns", inputs["gradient"], "x_t", x)
            if self._reads_last_x0:
                inputs["history"] = state.x0
            inputs["x0_out"] = state.next_x0
        if self._linear is not None:
            return self._take_linear(kind, row, still_read, inputs)
        self.ops.extended_step(
            x,
            still_read,
            self._extended,
            row,
            clip=options.clip,
            **self._noise(kind.noisy or bool(self._constant)),  # the known part has noise of its own
            out=state.next_x,
            out_copy=state.next_copy,
            **inputs,
        )

    def _noise(self, noisy: bool) -> dict[str, Any]:
        return {"rng": self.rng} if noisy else {"add_noise": False}

    def _take_plain(self, kind: RowKind, row: int | Tensor, t: Tensor) -> None:
        x, kwargs = self.state.x, self._single_kwargs
        if self.options.autocast is None:  # Python's share of a small step: no call is made that can be spared
            model_output = unwrap(self.model(x, t, **kwargs) if kwargs else self.model(x, t))
        else:
            model_output = self._call(self.model, x, t, **kwargs)
        if self.options.learned:
            model_output = self._prediction(model_output)
        at, index = (None, row) if type(row) is int else checks.split_t(row)
        self._reverse_steps[kind.noisy].take(x, model_output, at, index, self.state.next_x)

    def _take_linear(
        self, kind: RowKind, row: int | Tensor, model_output: Tensor | None, inputs: dict[str, Any]
    ) -> None:
        """A step with history. The known part of the samples, if there is one, takes a second launch."""
        state, known = self.state, {name: inputs.pop(name) for name in self._constant}
        inputs |= state.history(kind)
        if not known:
            inputs["out_copy"] = state.next_copy
        out, how = state.next_x, {"clip": self.options.clip, **self._noise(kind.noisy)}
        self.ops.linear_step(state.x, model_output, self._linear, row, **how, out=out, **inputs)
        if known:
            copy = state.next_copy
            self.ops.extended_step(
                out, None, self._unchanged, row, clip=None, rng=self.rng, out=out, out_copy=copy, **known
            )

    def _call(self, model: Model, x: Tensor, t: Tensor, **model_kwargs: Any) -> Tensor:
        last_x0 = (self.state.x0,) if self.options.self_condition else ()
        if self.options.autocast is None:
            return unwrap(model(x, t, *last_x0, **model_kwargs))
        with torch.autocast(x.device.type, self.options.autocast, cache_enabled=False):
            return unwrap(model(x, t, *last_x0, **model_kwargs))

    def _once_a_sample(self, t: Tensor) -> Tensor:
        """The timesteps for a call with a single batch."""
        return t[: self.state.batch] if self.options.doubled else t

    def _prediction(self, model_output: Tensor) -> Tensor:
        return split_variance(self.state.x, model_output)[0] if self.options.learned else model_output

    def _outputs(self, kind: RowKind, t: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The model's prediction. Its unconditional output and its variance are added to the step's `inputs`."""
        state, options = self.state, self.options
        x, guidance = state.x, options.guidance
        uncond_output = None
        if not kind.guided or guidance is None:
            model_output = self._call(self.model, x, self._once_a_sample(t), **self._single_kwargs)
        elif guidance.unconditional is None:
            both = self._call(self.model, state.x_twice, t, **options.model_kwargs)
            if len(both) != 2 * state.batch:
                raise ValueError(
                    f"the model's output has {len(both)} samples, expected {2 * state.batch}: guidance without a "
                    "function for the unconditional output gives it the batch twice"
                )
            uncond_output, model_output = both[: state.batch], both[state.batch :]
        else:
            model_output = self._call(self.model, x, t, **options.model_kwargs)
            uncond_output = self._call(guidance.unconditional, x, t)
        if options.learned:
            model_output, variance = split_variance(x, model_output)
            if self.rows.variance is not None:
                inputs |= {"model_variance": variance, "log_variance": self.rows.variance == "log"}
        if uncond_output is not None and guidance is not None:
            uncond_output = self._prediction(uncond_output)
            checks.like("uncond_output", uncond_output, "x_t", x, lower=True)
            if guidance.unconditional is not None:  # or else it is the other half of the same tensor
                checks.like("model_output", model_output, "x_t", x, lower=True)
            inputs["uncond_output"] = uncond_output
            if guidance.rescale > 0:
                inputs["output_scale"] = self.ops.output_scale(
                    model_output, uncond_output, guidance=guidance.scale, rescale=guidance.rescale
                )
        return model_output

    def _x_start(self, kind: RowKind, row: int | Tensor, model_output: Tensor, inputs: dict[str, Any]) -> Tensor | None:
        """Adds to the step's `inputs` what denoised_fn and thresholding make of x0. Returns the model output only if
        the step still reads it.
        """
        state, options, threshold = self.state, self.options, self.options.threshold
        bound = {} if threshold is None else {"quantile": threshold.quantile, "maximum": threshold.maximum}
        guided = {name: inputs[name] for name in ("uncond_output", "output_scale") if name in inputs}
        if options.denoised_fn is None:
            if threshold is not None:
                inputs["x_start_scale"] = self.ops.x_start_scale(
                    state.x, model_output, self._x0_rows, row, **bound, **guided
                )
            return model_output
        x_start = self.ops.extended_step(
            state.x, model_output, self._x0_rows, row, clip=None, add_noise=False, out=state.scratch, **guided
        )
        x_start = options.denoised_fn(x_start)
        checks.like("what denoised_fn returns", x_start, "x_t", state.x)
        if threshold is not None:
            inputs["x_start_scale"] = self.ops.x_start_scale(x_start, **bound)
        inputs["x_start"] = x_start
        if kind.needs_output:
            return model_output
        for name in guided:
            del inputs[name]
        return None
