"""A loop: samples on their way through the rows of a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.optional import counter
from ddpm_ext.base.types import Model
from ddpm_ext.loop.cuda_graphs import Graphs
from ddpm_ext.loop.host_copies import HostCopies
from ddpm_ext.loop.interpolation import Interpolation
from ddpm_ext.loop.rows import Kind, LoopTables
from ddpm_ext.loop.step import StepOptions, Stepper
from ddpm_ext.ops.noise import STREAM_START, Philox, rng_of_many

__all__ = ["Loop", "Record"]


class Record(NamedTuple):
    """A loop after one of its steps.

    step: 0 for the first; timestep: where it started from; x_t: the samples, where it arrived; x0: the clean ones that
    it predicted, or None where they were not asked for. Both are on the loop's device, in buffers that it writes to
    again: copy what is to last.
    """

    step: int
    timestep: int | float
    x_t: Tensor
    x0: Tensor | None = None


def _compiled(model: Model, how: bool | str) -> Model:
    if isinstance(how, str):
        try:
            return torch.compile(model, mode=how)
        except RuntimeError as error:
            raise ValueError(f"compile is {how!r}, expected a bool or a mode of torch.compile: {error}") from None
    if not isinstance(how, bool):
        raise TypeError(f"compile is {how!r}, expected a bool or a mode of torch.compile")
    return torch.compile(model) if how else model


def _model_device(model: Any) -> torch.device:
    parameters = getattr(model, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return torch.device("cpu") if first is None else first.device


def _check_given(
    name: str, given: object, shape: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype
) -> None:
    checks.tensor(name, given)
    assert isinstance(given, Tensor)
    if given.shape != shape:
        raise ValueError(f"{name} has shape {tuple(given.shape)}, expected {shape}")
    if given.dtype != dtype:
        raise TypeError(f"{name} has dtype {given.dtype}, expected that of the samples, {dtype}")
    if device is not None and given.device != checks.device(device):
        raise ValueError(f"{name} is on {given.device}, expected the samples' device, {device}")


class Loop:
    """Samples on their way through the rows of a table, from row `first` on: see GaussianDiffusion.p_sample_loop, whose
    options these are. All that it needs beside what the model makes is allocated here.
    """

    def __init__(
        self,
        backend: ModuleType,
        model: Model,
        shape: tuple[int, ...],
        tables: LoopTables,
        first: int,
        options: StepOptions,
        *,
        start: Tensor | Interpolation | None = None,
        noise: Tensor | None = None,
        rng: Philox | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        compile: bool | str = False,
        graph: bool | str = False,
    ) -> None:
        self.backend, self.tables = backend, tables
        self.shape, self.dtype = checks.shape(shape, least=1), dtype
        self.first = first
        self._device = None if device is None else checks.device(device)
        if self._device is None:
            given = [x for x in (start, noise) if x is not None]
            image = given[0] if given else None
            image = image.first if isinstance(image, Interpolation) else image
            self._device = image.device if isinstance(image, Tensor) else _model_device(model)
        if graph and compile in ("reduce-overhead", "max-autotune"):
            raise ValueError(
                f"compile is {compile!r}, which makes CUDA graphs itself, beside graph, expected one of them"
            )
        rng = rng_of_many(rng)
        x = self._begin(rng, start, noise)
        backend.check_reverse_step(
            x, tables.device.get("steps", x.device, checks.compute_dtype(x.dtype)), first, rng=rng
        )
        if graph:
            rng = _in_memory(rng, len(x), x.device)
            kwargs = {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in options.model_kwargs.items()
            }
            options = replace(options, model_kwargs=kwargs)
        self.stepper = Stepper(backend, _compiled(model, compile), tables, x, rng, options)
        batch = len(self.stepper.state.x_twice)
        moments = tables.device.timesteps(x.device)
        self._graphs = Graphs(x.device) if graph else None
        self._whole = graph == "loop"
        if graph and not self._whole:
            self._moments, self._row = moments, torch.full((batch,), self.first, device=x.device)
        else:
            # every step's timesteps at once: the model gets a row of this, and no step makes a tensor
            self._moments = moments[:, None].repeat(1, batch)

    def _begin(self, rng: Philox, start: Tensor | Interpolation | None, noise: Tensor | None) -> Tensor:
        """Where the first step starts from."""
        if start is not None and noise is not None:
            raise ValueError("noise and start are both given, expected one of them")
        if noise is not None:
            _check_given("noise", noise, self.shape, self._device, self.dtype)
            return noise
        if start is None:
            return self.backend.randn(self.shape, rng.of(STREAM_START, 0), device=self._device, dtype=self.dtype)
        images = (start.first, start.second) if isinstance(start, Interpolation) else (start,)
        noised = []
        for draw, image in enumerate(images):
            _check_given("start", image, self.shape, self._device, self.dtype)
            scales = self.tables.device.find("start", image.device, checks.compute_dtype(self.dtype))
            if scales is None:
                raise ValueError(
                    "start is given, expected a sampler whose timesteps are the schedule's own, or its name"
                )
            with torch.no_grad():
                noised.append(self.backend.forward_process(image, scales, self.first, rng=rng.of(STREAM_START, draw)))
        return start.mix(*noised) if isinstance(start, Interpolation) else noised[0]

    def __len__(self) -> int:
        """Steps."""
        return len(self.tables) - self.first

    def restart(
        self,
        rng: Philox | None,
        start: Tensor | Interpolation | None = None,
        noise: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Back to the first step, in the same memory: of a captured loop."""
        if start is None and self.first > 0:
            raise ValueError(
                f"start is None, expected one: the loop takes the last {len(self)} of {len(self.tables)} steps"
            )
        rng = rng_of_many(rng)
        x = self._begin(rng, start, noise)
        kept, new = self.stepper.rng, _in_memory(rng, len(x), x.device)
        assert kept.seed is not None and kept.sample_ids is not None and new.seed is not None
        assert new.sample_ids is not None
        checks.per_sample("sample_ids", new.sample_ids, len(x), x.device, 2**56 - 1)
        if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
            raise TypeError(f"model_kwargs is a {type(model_kwargs).__name__}, expected a dict")
        given = dict(model_kwargs or {})
        own = self.stepper.options.model_kwargs
        for name, value in given.items():
            if not isinstance(own.get(name), Tensor):
                raise ValueError(f"model_kwargs has {name!r}, expected tensors that were given when the loop was made")
            checks.like(f"model_kwargs[{name!r}]", value, "the one given before", own[name])
        kept.seed.copy_(new.seed)
        kept.sample_ids.copy_(new.sample_ids)
        for name, value in given.items():
            own[name].copy_(value)
        self.stepper.state.restart(x)
        if not self._whole:
            self._row.fill_(self.first)

    @torch.no_grad()
    def run(self, progress: bool = False, copies: HostCopies | None = None) -> Iterator[Record]:
        """The steps, each taken when it is asked for."""
        state, told = self.stepper.state, self.tables.timesteps
        for step in _steps(len(self), len(state.x), progress):
            row = self.first + step
            if copies is not None:
                copies.before_overwriting(state.next_x)
                if state.next_x0 is not None:
                    copies.before_overwriting(state.next_x0)
            self._take(row)
            state.advance(self.tables.kinds[row])
            yield Record(step, told[row], state.x, state.x0 if self.stepper.options.hand_out else None)

    @torch.no_grad()
    def run_whole(self) -> Tensor:
        """All steps in one graph; the samples."""
        assert self._graphs is not None
        state, begin = self.stepper.state, self.stepper.state.x.clone()

        def go(take: Callable[[Kind, int, Tensor], None]) -> None:
            state.rewind()
            for row in range(self.first, len(self.tables)):
                take(self.tables.kinds[row], row, self._moments[row])
                state.advance(self.tables.kinds[row])

        self._graphs.run("loop", lambda: go(self.stepper.take), lambda: state.restart(begin))
        go(lambda *_: None)  # a graph that is played advances nothing here
        return state.x

    def _take(self, row: int) -> None:
        kind, stepper = self.tables.kinds[row], self.stepper
        if self._graphs is None:
            return stepper.take(kind, row, self._moments[row])
        batch = len(stepper.state.x)

        def step() -> None:
            stepper.take(kind, self._row[:batch], self._moments.index_select(0, self._row))
            self._row.add_(1)

        self._graphs.run((kind, *stepper.state.turn), step, lambda: self._row.sub_(1))


def _in_memory(rng: Philox, batch: int, device: torch.device) -> Philox:
    """The same, with everything in tensors on the device: what a graph reads anew each time it is played."""
    seed = torch.tensor(rng.seed_value, device=device) if rng.seed is None else rng.seed
    ids = rng.sample_ids
    if ids is None:
        ids = torch.arange(rng.first_id, rng.first_id + batch, device=device)
    return Philox(seed.to(device, copy=True), ids.to(device, copy=True))


def _steps(count: int, batch: int, progress: bool) -> Iterable[int]:
    if not progress:
        return range(count)
    bar = counter(count, "sampling loop time step")
    return bar if isinstance(bar, range) else _shown(bar, count, batch)


def _shown(bar: Any, count: int, batch: int) -> Iterator[int]:
    """With images a second, by the steps so far."""
    begin = time.perf_counter()
    for step in bar:
        yield step
        rate = batch * (step + 1) / count / (time.perf_counter() - begin)
        bar.set_postfix_str(f"{rate:.3g} images/s", refresh=False)
