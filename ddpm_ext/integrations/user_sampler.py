"""UserSampler runs a sampler function that a user wrote, with k-diffusion's signature, or the rows that replace it.

In the first loop with some settings, the function itself runs, and the caller gets its result. The rows that were
traced from the function are also computed. At each call of the model, the result of a row is compared with the sample
that the function passes to the model. If all rows agree, they replace the function in later loops.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.integrations.proof import Proof, kinds_of, setting_key
from ddpm_ext.integrations.sigma_rows import SigmaRows, first_rows_or_all
from ddpm_ext.ops.noise import Philox, randn, rng_of_many
from ddpm_ext.tables.step_table import StepTable
from ddpm_ext.tables.trace import TraceResult, follow_function
from ddpm_ext.tables.trace_function import ModelLike, checked_sigmas
from ddpm_ext.tables.trace_run import Observed

CACHED = 32  # the number of loops whose traced rows a UserSampler caches
NoiseSampler = Callable[[Tensor, Tensor], Tensor]


def rows_of_function(
    function: Callable[..., Tensor], levels: Tensor, options: Mapping[str, Any], model: object
) -> tuple[SigmaRows, TraceResult]:
    """The rows of a function's steps, and the result of tracing it. Raises ValueError if its steps can't be traced."""
    traced = follow_function(function, levels, options, model)
    table = StepTable(**traced.columns)
    return SigmaRows.of(table, list(traced.step_starts) or first_rows_or_all(table, levels[:-1])), traced


def _state(function: Callable[..., Any]) -> list[Any]:
    """The values that a function may read besides arguments and globals: of its closure, and of a method's object."""
    cells = getattr(function, "__closure__", None) or ()
    return [*[cell.cell_contents for cell in cells], *vars(getattr(function, "__self__", SimpleNamespace())).values()]


@dataclass(frozen=True, kw_only=True)
class SamplerCall:
    """The arguments of a call of a sampler; see k_diffusion.sampler. `options` has those that only this sampler has."""

    options: dict[str, Any]
    model: Callable[..., Tensor]
    x: Tensor
    sigmas: Tensor
    extra_args: Mapping[str, Any] | None
    callback: Callable[[dict[str, Any]], Any] | None
    disable: bool | None
    noise_sampler: NoiseSampler | None
    rng: Philox | None
    unconditional: Callable[[], Tensor] | None = None


class TracedLoop(NamedTuple):
    """The loop of a sampler function with given sigmas and options, and what is known about its rows.

    Attributes:
        rows: the traced rows, or None if there are none.
        proofs: {(shape, dtype, device) of the samples: the proof of the rows}.
        draws: for each row, the number of the function's draw that is the row's noise, counted from 0 at each call of
            the model; None for a row without noise.
        row_before_model: whether the first row comes before the first call of the model.
        no_rows_reason: why there are no rows.
    """

    rows: SigmaRows | None
    proofs: dict[object, Proof]
    draws: list[int | None]
    row_before_model: bool = False
    no_rows_reason: str = ""


class UserSampler:
    """A user's sampler function, with a cache of the rows of its loops."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self._parameters = inspect.signature(function).parameters
        # An entry also references the objects whose ids are in its key: otherwise Python could free an object and give
        # its id to a new one.
        self._loops: BoundedCache[tuple[TracedLoop, Any]] = BoundedCache(CACHED)
        self._warned: set[str] = set()

    def _loop(self, call: SamplerCall) -> TracedLoop:
        """The TracedLoop for the sigmas and options of a call, cached."""
        levels, values = checked_sigmas(call.sigmas), [*call.options.values(), *_state(self.function)]
        passed_arguments = kinds_of(call.extra_args), call.callback is None, call.disable
        key = (tuple(levels.tolist()), *call.options, *map(setting_key, values), *passed_arguments)
        return self._loops.get_or_make(key, lambda: (self._traced(levels, call), values))[0]

    def _traced(self, levels: Tensor, call: SamplerCall) -> TracedLoop:
        try:
            rows, traced = rows_of_function(self.function, levels, call.options, call.model)
        except Exception as error:  # the user's code may raise anything on the samples of tracing
            return TracedLoop(None, {}, [], no_rows_reason=str(error))
        if traced.reads_model:
            return TracedLoop(None, {}, [], no_rows_reason="it reads attributes of the model")
        return TracedLoop(rows, {}, traced.noise, traced.row_before_model)

    def rows_or_result(self, call: SamplerCall) -> Any:
        """The rows, if they have been proven for such calls. Otherwise runs the function and returns its result."""
        loop, x = self._loop(call), call.x
        proof = None if loop.rows is None else loop.proofs.setdefault((x.shape, x.dtype, x.device), Proof())
        if proof is not None and len(proof.holds) == len(loop.draws):
            return loop.rows
        no_rows_reason = loop.no_rows_reason if proof is None else proof.failed
        if no_rows_reason is not None:
            self._warn(no_rows_reason)
            proof = None
        if proof is not None and call.noise_sampler is None and any(draw is not None for draw in loop.draws):
            call = replace(call, rng=rng_of_many(call.rng, x.device))
        options = {"extra_args": dict(call.extra_args or {}), "callback": call.callback, "disable": call.disable}
        is_plain = proof is None and call.rng is None and call.noise_sampler is None
        side_by_side = _SideBySideRun(loop, proof, call)
        if not is_plain:
            options["noise_sampler"] = side_by_side.sampled
        options = {name: value for name, value in options.items() if name in self._parameters} | call.options
        if is_plain:
            return self.function(call.model, x, call.sigmas, **options)
        with side_by_side.observed:
            result = self.function(side_by_side.model_for(call.model), x, call.sigmas, **options)
        side_by_side.finish_row(result)
        if proof is not None and proof.failed is not None:
            self._warn(proof.failed)
        return result

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            name = getattr(self.function, "__name__", "the sampler")
            warnings.warn(f"{name} runs as it is: {reason}", stacklevel=5)


class _SideBySideRun:
    """A run of the function in which each row is also computed, with the same noise, and compared with the function.

    Without a proof, nothing is compared: the run only passes the call's noise to the function.

    Attributes:
        observed: the mode that replaces the function's draws by the noise of the comparison.
    """

    def __init__(self, loop: TracedLoop, proof: Proof | None, call: SamplerCall) -> None:
        self._loop, self._proof, self._call, self._drawn = loop, proof, call, 0
        self.observed = Observed(call.x.shape, lambda _, count: self._noise(count, None), keeps_float64=False)
        self._row = -1  # the current row; -1 before the first
        self._inputs: tuple[Tensor, Tensor] | None = None  # the sample and model output of the current row
        self._z: Tensor | None = None  # the noise of the current row
        self._history: tuple[Tensor, ...] = ()
        if loop.row_before_model:
            self._begin_row(call.x, call.x)

    def model_for(self, model: Callable[..., Any]) -> Any:
        """A wrapper of the model that observes its calls.

        The wrapper's class is derived from the model's, because the function may check the model's class.
        """

        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            with self.observed.paused():
                self.finish_row(x)
                m = model(x, *args, **kwargs)
                if isinstance(m, Tensor):
                    self._begin_row(x, m)
                elif self._proof is not None:
                    self._proof.failed = f"the model returns a {type(m).__name__}"
                return m

        if inspect.isroutine(model):
            return functools.wraps(model)(call)
        cls = type(model)
        try:
            wrapper: Any = object.__new__(type(cls.__name__, (cls,), {"__call__": staticmethod(call)}))
            wrapper.__dict__ = model.__dict__
        except (TypeError, AttributeError):  # for a class such as functools.partial, or without subclasses or __dict__
            return ModelLike(call, model)
        return wrapper

    def sampled(self, *levels: Any) -> Tensor:
        """The noise_sampler that the function gets."""
        with self.observed.paused():
            count = len(self.observed.draws)
            self.observed.draws.append(self._call.x.dtype)
            return self._noise(count, levels)

    def _noise(self, count: int, levels: tuple[Any, ...] | None) -> Tensor:
        """The noise of the draw number `count` in the current row.

        Args:
            levels: the arguments of a call of noise_sampler, or None for a draw of the function itself.
        """
        x, draws, call = self._call.x, self._loop.draws, self._call
        is_used = self._proof is not None and 0 <= self._row < len(draws) and draws[self._row] == count
        if call.noise_sampler is not None and (levels is not None or is_used):
            z = call.noise_sampler(*(levels or self._levels_of(self._row)))
        elif call.rng is not None and (is_used or self._proof is None):
            number = self._row if is_used else self._drawn
            z = randn(x.shape, call.rng, draw=number, device=x.device).to(x.dtype)
        else:
            z = torch.randn(x.shape, device=x.device, dtype=x.dtype)
        self._drawn += 1
        if is_used:
            self._z = z.clone()
        return z

    def _levels_of(self, row: int) -> tuple[Tensor, Tensor]:
        """The sigmas at which a row's step begins and the row ends, with which later loops call noise_sampler."""
        rows, x = self._loop.rows, self._call.x
        assert rows is not None
        first = next(step[0] for step in rows.steps if row in step)
        return rows.sigma[first].to(x), rows.arrives[row].to(x)

    def _begin_row(self, x: Tensor, m: Tensor) -> None:
        self._row, self._z = self._row + 1, None
        self.observed.begin(self._row)
        self._inputs = None if self._proof is None else (x.clone(), m.clone())

    def finish_row(self, x: Tensor) -> None:
        """Compares the result of the current row with the function's sample x."""
        rows, proof, i = self._loop.rows, self._proof, self._row
        if rows is None or proof is None or proof.failed is not None or self._inputs is None:
            return
        if i >= len(self._loop.draws) or (self._loop.draws[i] is not None and self._z is None):
            proof.failed = "it calls the model or draws noise at other steps than its rows"
            return
        sample, m = self._inputs
        sample = sample.to(torch.promote_types(sample.dtype, m.dtype))
        inputs = {} if self._z is None else {"noise": self._z.to(sample.dtype)}
        prev, stored = rows.stepper.take(i, sample, m, self._history, inputs)
        size = rows.stepper.largest_term(i, sample, m, self._history)
        self._history = self._history if stored is None else (stored, *self._history[:2])
        proof.compare(i, (prev,), (x,), size)
