"""Observes a function that runs its own loop, such as k-diffusion's samplers, for tracing.

The function is called with a probe in place of the model. A step begins with a call of the probe and ends with the next
call: its result is the sample of the next call, or the function's return value. To give a step another sample, the
probe writes this sample into the tensor with which it was called. If this tensor is a copy, the write has no effect on
the function, whose step starts from the previous step's result. Tracing supports this, too, but may then refuse steps
that read several earlier samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.tables.trace_run import Draw, Observed, Result, Run, Step, fresh_numbers, on_cpu

CLEAN = "denoised"  # the name of a step's second tensor: the model's output, which is the clean sample


class ModelLike:
    """A model that calls the function `call`, and has the attributes of the object `like`.

    was_read: whether an attribute of `like` has been read.
    """

    def __init__(self, call: Callable[..., Tensor], like: object) -> None:
        self._call, self._like = call, like
        self.was_read = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        self.was_read = True
        return getattr(self._like, name)


def check_function(sampler: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The function's parameters. Raises TypeError if none of them is called sigmas."""
    parameters = inspect.signature(sampler).parameters
    if "sigmas" not in parameters:
        first = ", ".join(list(parameters)[:3])
        raise TypeError(f"the sampler is a function of {first} ..., expected one of model, x and sigmas")
    return parameters


def checked_sigmas(sigmas: Any) -> Tensor:
    """sigmas as float64 (levels,) on the CPU. Raises TypeError and ValueError."""
    levels = torch.as_tensor(sigmas, device="cpu").detach().to("cpu", torch.float64, copy=True)
    if levels.dim() != 1 or len(levels) < 2:
        raise ValueError(f"sigmas has shape {tuple(levels.shape)}, expected (levels,) with at least 2 of them")
    if not (levels.isfinite() & (levels >= 0)).all():
        raise ValueError(f"sigmas reaches from {levels.min()} to {levels.max()}, expected finite numbers >= 0")
    return levels


class ObservedFunction:
    """The loop of a function. The constructor runs the function once, to record its calls of the model.

    Args:
        sampler: a function sampler(model, x, sigmas), which may also have the parameters extra_args, callback, disable
            and noise_sampler.
        sigmas: (levels,), finite, >= 0.
        options: further arguments.
        like: the object whose attributes the probe has.

    Attributes:
        run: the function's loop.
        step_starts: the numbers of the steps in which the function calls its callback, empty if it never does.
        row_before_model: whether there is a step before the first call of the model.
        reads_model: whether the function reads attributes of the model.

    Raises:
        TypeError: the function has no parameter sigmas.
        ValueError: sigmas of a wrong shape or out of range; noise of a shape other than the samples'; a function that
            never calls the model, passes it arguments that are not in extra_args, or can't compute in float64.
    """

    def __init__(
        self, sampler: Callable[..., Any], sigmas: Any, options: Mapping[str, Any], like: object = None
    ) -> None:
        self._parameters, self._sigmas = check_function(sampler), checked_sigmas(sigmas)
        self._sampler, self._options, self._like = sampler, options, like
        generator = torch.Generator().manual_seed(0)

        def normal(*_: int) -> Tensor:
            return torch.empty(2, 1, 1, 1, dtype=torch.float64, device="cpu").normal_(generator=generator)

        start, times, callback_steps = normal(), [], []
        samples_of_calls: list[Tensor] = []
        expected = {*(options.get("extra_args") or {})}

        def model(x: Tensor, sigma: Tensor, **model_kwargs: Any) -> Tensor:
            if unknown := model_kwargs.keys() - expected:  # a real model may return values through such arguments
                names = ", ".join(sorted(unknown))
                raise ValueError(f"the model is called with {names}, expected no arguments but those of extra_args")
            samples_of_calls.append(x.clone())
            times.append(float(torch.as_tensor(sigma, device="cpu").reshape(-1)[0]))
            return 0.5 * x

        with on_cpu(), torch.no_grad(), fresh_numbers(), Observed(start.shape, normal) as observed:
            probe = ModelLike(model, like)
            self._call(observed, probe, start.clone(), lambda _: callback_steps.append(len(times) - 1))
        if not times:
            raise ValueError("the model is never called, expected a call in each step")
        self.row_before_model, self.reads_model = not torch.equal(samples_of_calls[0], start), probe.was_read
        if self.row_before_model:
            times.insert(0, float(self._sigmas[0]))
            callback_steps = [i + 1 for i in callback_steps]
        self.step_starts = tuple(callback_steps)
        self.run = Run(times, "sigma", self._observe, follows_previous=True)

    def _call(
        self, observed: Observed, model: Callable[..., Tensor], x: Tensor, callback: Callable[[Any], Any] | None = None
    ) -> Any:
        arguments: dict[str, Any] = {"extra_args": {}, "callback": callback, "disable": True}
        arguments["noise_sampler"] = lambda *_: observed.draw(x.shape, x.dtype)
        arguments = {name: value for name, value in arguments.items() if name in self._parameters}
        try:
            return self._sampler(model, x, self._sigmas.clone(), **arguments | dict(self._options))
        except RuntimeError as error:
            raise ValueError(f"the function raises an error for samples in float64: {error}") from error

    def _observe(self, samples: Sequence[Tensor], outputs: Sequence[Tensor], noise: Draw) -> list[Step]:
        """Runs the function and returns its steps. This is `observe` of its Run."""
        steps: list[Step] = []
        second: Tensor | None = None
        count = len(self.run.times)

        def end(prev: Tensor) -> None:
            steps.append(Step(Result(Tensor, None if second is None else CLEAN), prev.clone(), second, observed.draws))
            observed.begin(len(steps))

        def refused(comparison: str) -> ValueError:
            return ValueError(
                f"the model is called {comparison} than {count - self.row_before_model} times for other samples, on "
                "which the steps depend: they are not linear"
            )

        def model(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
            nonlocal second
            with observed.paused():
                if self.row_before_model or second is not None:
                    end(x)
                    if len(steps) == count:
                        raise refused("more")
                    x.copy_(samples[len(steps)])
                second = outputs[len(steps)]
                return second.clone()

        with on_cpu(), torch.no_grad(), fresh_numbers(), Observed(samples[0].shape, noise) as observed:
            result = self._call(observed, ModelLike(model, self._like), samples[0])
        if not isinstance(result, Tensor):
            raise ValueError(f"the function returns a {type(result).__name__}, expected the samples")
        end(result)
        if len(steps) < count:
            raise refused("fewer")
        return steps
