"""One step of a sampling loop: the call of the model, and the launch that computes the next samples."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.types import Model
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import LoopRows
from ddpm_ext.ops.noise import Philox
from ddpm_ext.ops.result_memory import empty_like
from ddpm_ext.process.model_output import split_batch, split_variance, unwrap
from ddpm_ext.tables.row_needs import RowNeeds

HISTORY = ("history1", "history2", "history3")


@dataclass(frozen=True, eq=False)
class StepCall:
    """The buffers and arguments of a step. Rows with the same needs and buffers share one StepCall.

    Attributes:
        needs: what the steps of these rows need, such as a model call or noise.
        step: the TableStep that computes these rows' steps, with or without noise.
        x: the samples before the step.
        once: the model's input, in the dtype of the option `input_dtype` (default: the dtype of the samples).
        twice: the model's input for a doubled batch: the samples twice, one batch after the other. In a loop without
            doubled batches, the same as `once`.
        out: the next samples.
        last_x0, x0: the predicted clean samples before and after the step, or None if the loop does not need them.
        inputs: further arguments of the TableStep's method `take`.
    """

    needs: RowNeeds
    step: Any
    x: Tensor
    once: Tensor
    twice: Tensor
    out: Tensor
    last_x0: Tensor | None
    x0: Tensor | None
    inputs: dict[str, Any]


class _Buffers(NamedTuple):
    """One of the two sets of buffers for samples and the model's input: `x`, `once` and `twice` of a StepCall.

    If the model's input has the dtype of the samples, `x`, `once` and the first half of `twice` are the same memory. A
    step before a guided one then writes its result twice: to `x`, and to `second_half`, the second half of `twice`. If
    the dtypes differ, or the loop has no guided steps with a doubled batch, second_half is None.
    """

    x: Tensor
    once: Tensor
    twice: Tensor
    second_half: Tensor | None

    @classmethod
    def like(cls, x: Tensor, doubled: bool, dtype: torch.dtype) -> _Buffers:
        """New buffers for samples like x.

        Args:
            doubled: whether the model gets the batch twice in some steps.
            dtype: the dtype of the model's input.
        """
        template = x.expand(2, *x.shape) if doubled else x
        # empty_like takes memory from the pool of results (ops/result_memory.py).
        twice = empty_like(template) if dtype is x.dtype else torch.empty_like(template, dtype=dtype)
        once, second_half = twice, None
        if doubled:
            once, second_half = twice.unbind()
            twice = twice.flatten(0, 1)
        if dtype is x.dtype:
            return cls(once, once, twice, second_half)
        return cls(empty_like(x), once, twice, None)

    def fill(self, x: Tensor) -> None:
        """Copies the samples x to all buffers."""
        twice, x = self.twice, x.detach()  # the buffers must not require gradients, since the steps write to them
        (twice if len(twice) == len(x) else twice.unflatten(0, (-1, len(x)))).copy_(x)
        if self.once is not self.x:
            self.x.copy_(x)

    def model_input(self, next_needs: RowNeeds | None) -> Tensor | None:
        """The tensor to which a step writes its result besides `x`, as the model's input in the next row.

        None if no row follows, or if the next row does not call the model or reads its input from `x` alone.

        Args:
            next_needs: the needs of the next row, None if there is none.
        """
        if next_needs is None or not next_needs.calls_model:
            return None
        if self.once is not self.x:
            return self.twice if next_needs.guided else self.once
        return self.second_half if next_needs.guided else None


def _has_rows(value: object, rows: int) -> bool:
    """Whether a value is a tensor of size `rows` in its first dimension."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows


class LoopStep:
    """Takes the steps of a loop one by one. The constructor allocates the buffers to which the steps write.

    Attributes:
        calls: the StepCall of each row.
        kwargs: the model's keyword arguments.
        doubled: whether the model gets the batch twice in a guided step.
    """

    def __init__(
        self,
        ops: ModuleType,
        model: Model,
        rows: LoopRows,
        x: Tensor,
        rng: Philox,
        options: LoopOptions,
        kwargs: dict[str, Any],
    ) -> None:
        self.model, self.options, self.rng, self.kwargs = model, options, rng, kwargs
        guidance = options.guide
        if guidance is not None and guidance.rescale > 0 and rows.guided and x.numel() < 2 * len(x):
            raise ValueError(f"guidance rescale is {guidance.rescale}, expected 0 for samples of one element")
        self._batch, self._learned, self._variance = len(x), rows.learned, rows.variance
        # The model's keywords for a single batch: the conditional half of each doubled model_kwarg.
        self._kwargs = {
            name: value[len(x) :] if options.doubled_kwargs and _has_rows(value, 2 * len(x)) else value
            for name, value in kwargs.items()
        }
        self._dtype, self.doubled = options.input_dtype or x.dtype, rows.doubles(options)
        tables, dtype = rows.device, checks.compute_dtype(x.dtype)
        if options.denoised_fn is not None:
            self._to_x0 = ops.TableStep(tables.get("x0", x.device, dtype), clip=None, add_noise=False)
            self._x_start = empty_like(x)
        # Rows without noise run on kernels without noise, which have fewer branches and use fewer registers. With
        # inpainting, every row adds noise to the known part of the samples.
        steps, on_host = (tables.get("steps", device, dtype) for device in (x.device, torch.device("cpu")))
        noiseless = ops.TableStep(steps, on_host=on_host, clip=options.clip, add_noise=False)
        noisy = ops.TableStep(steps, on_host=on_host, clip=options.clip, rng=rng)
        noisy.check(x, None, 0)
        self.calls = self._calls(rows, x, noiseless, noisy)

    def _calls(self, rows: LoopRows, x: Tensor, noiseless: Any, noisy: Any) -> list[StepCall]:
        """Allocates the loop's buffers and assigns them to the rows.

        There are two buffers of samples, and two of predicted clean samples: a step reads one and writes the other.
        There are three tensors of history: a row that adds to the history overwrites the oldest.
        """
        options = self.options
        samples = [_Buffers.like(x, self.doubled, self._dtype) for _ in range(2)]
        samples[0].fill(x)
        has_x0 = options.x0 or options.self_condition
        clean = [torch.zeros_like(x), torch.zeros_like(x)] if has_x0 else [None, None]
        history = [torch.zeros_like(x) for _ in HISTORY] if any(needs.keeps for needs in rows.needs) else []
        constant: dict[str, Any] = {}
        if options.inpaint is not None:
            constant["known"], constant["mask"] = options.inpaint.tensors(x)
        if options.threshold is not None:
            constant |= {"quantile": options.threshold.quantile, "maximum": float(options.threshold.maximum)}
        step_of = {False: noisy if options.inpaint is not None else noiseless, True: noisy}
        writes_input = self.doubled or self._dtype is not x.dtype
        by_key: dict[Any, StepCall] = {}
        calls = []
        for needs, next_needs in zip(rows.needs, [*rows.needs[1:], None], strict=True):
            model_input = samples[1].model_input(next_needs) if writes_input else None
            key = needs, id(samples[0]), id(clean[0]), id(history[0]) if history else 0, id(model_input)
            if key not in by_key:
                inputs = constant if model_input is None else constant | {"model_input": model_input}
                by_key[key] = self._call(needs, step_of[needs.noisy], samples, clean, history, inputs)
            calls.append(by_key[key])
            samples = samples[::-1]
            if needs.calls_model:
                clean = clean[::-1]
            if needs.keeps:
                history = [history[2], *history[:2]]
        return calls

    def _call(
        self,
        needs: RowNeeds,
        step: Any,
        samples: list[_Buffers],
        clean: list[Tensor] | list[None],
        history: list[Tensor],
        constant: dict[str, Any],
    ) -> StepCall:
        always_passed = ("known", "mask", "model_input")
        inputs = dict(constant) if needs.calls_model else {k: v for k, v in constant.items() if k in always_passed}
        inputs |= {name: history[i] for i, name in enumerate(HISTORY) if needs.history[i]}
        if needs.keeps:
            inputs["history_out"] = history[2]
        if needs.calls_model and clean[1] is not None:
            inputs["x0_out"] = clean[1]
        guidance = self.options.guide
        if needs.guided and guidance is not None and guidance.rescale > 0:
            inputs |= {"guidance": float(guidance.scale), "rescale": float(guidance.rescale)}
        x0 = clean[int(needs.calls_model)]
        return StepCall(needs, step, *samples[0][:3], samples[1].x, clean[0], x0, inputs)

    def take(self, call: StepCall, row: Tensor | None, index: int, t: Tensor) -> None:
        """Takes one step.

        Args:
            row, index: the index of the row, as a tensor `row` (batch,), or if that is None as the int `index`.
            t: the timesteps for the model, (batch,), or (2 * batch,) in a loop with doubled batches.
        """
        x, options, inputs = call.x, self.options, call.inputs
        if not call.needs.calls_model:
            call.step.take(x, None, row, index, call.out, **inputs)
            return
        m, u = self._outputs(call, t)
        inputs = dict(inputs)
        if self._learned:
            m, variance = split_variance(x, m)
            if self._variance is not None:
                inputs["model_variance"], inputs["log_variance"] = variance, self._variance == "log"
            if u is not None:
                u, _ = split_variance(x, u)
        if u is not None:
            inputs["uncond_output"] = u
        if options.denoised_fn is not None:
            guidance_inputs = {k: inputs[k] for k in ("uncond_output", "guidance", "rescale") if k in inputs}
            x_start = options.denoised_fn(self._to_x0.take(x, m, row, index, self._x_start, **guidance_inputs))
            checks.tensor("what denoised_fn returns", x_start)  # None would count as a missing x_start
            inputs["x_start"] = x_start
            if not call.needs.needs_output:
                m = None
                for name in guidance_inputs:
                    del inputs[name]
        if options.cond_fn is not None:
            inputs["gradient"] = options.cond_fn(x, self._single_batch(t), **self._kwargs)
            checks.tensor("what cond_fn returns", inputs["gradient"])
        call.step.take(x, m, row, index, call.out, **inputs)

    def _single_batch(self, t: Tensor) -> Tensor:
        return t[: self._batch] if self.doubled else t

    def _outputs(self, call: StepCall, t: Tensor) -> tuple[Any, Any]:
        """The model's conditional and unconditional output. The unconditional is None if the row does not need it."""
        guidance = self.options.guide
        if not call.needs.guided or guidance is None:
            return self._output(call, call.once, self._single_batch(t), self.model, self._kwargs), None
        if guidance.unconditional is not None:
            m = self._output(call, call.once, t, self.model, self.kwargs)
            return m, self._output(call, call.once, t, guidance.unconditional, {})
        doubled_output = self._output(call, call.twice, t, self.model, self.kwargs)
        return split_batch(call.x, doubled_output)

    def _output(self, call: StepCall, x: Tensor, t: Tensor, model: Model, kwargs: Any) -> Tensor:
        last_x0 = (call.last_x0,) if self.options.self_condition else ()
        if self.options.autocast is None:
            output = model(x, t, *last_x0, **kwargs)
        else:
            with torch.autocast(x.device.type, self.options.autocast, cache_enabled=False):
                output = model(x, t, *last_x0, **kwargs)
        torch._C._set_grad_enabled(False)  # the model may have enabled gradients
        return output if type(output) is Tensor else unwrap(output)

    def restart(self, x: Tensor) -> None:
        """Writes new samples to the first step's buffers, and zeros to its last_x0, so that the loop can run again."""
        first = self.calls[0]
        _Buffers(first.x, first.once, first.twice, None).fill(x)
        if first.last_x0 is not None:
            first.last_x0.zero_()
