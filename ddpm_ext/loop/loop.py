"""Loop, which draws samples: for each row of a step table it calls the model and takes a step, also in CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.optional import counter
from ddpm_ext.base.types import Model
from ddpm_ext.loop.begin import InitialSamples, compiled, rng_in_memory
from ddpm_ext.loop.cuda_graphs import CudaGraphs, restorer
from ddpm_ext.loop.host_copies import HostCopies
from ddpm_ext.loop.interpolation import Interpolation
from ddpm_ext.loop.options import LoopOptions, Record
from ddpm_ext.loop.rows import LoopRows
from ddpm_ext.loop.step import LoopStep, StepCall
from ddpm_ext.ops.noise import Philox, rng_of_many


class Loop:
    """A sampling loop. The constructor allocates the buffers to which the steps write their results.

    Args:
        ops: the module of the process's operators, ops.fused or ops.reference.
        model, shape, options: see p_sample_loop.
        rows: the rows of the loop.

    Attributes:
        whole: whether all steps are one CUDA graph.
    """

    def __init__(
        self, ops: ModuleType, model: Model, shape: tuple[int, ...], rows: LoopRows, options: LoopOptions
    ) -> None:
        self.rows = rows
        self._initial = InitialSamples(ops, model, shape, rows, options)
        rng = rng_of_many(options.rng, self._initial.device)
        x = self._initial.samples(rng, options.start, options.noise)
        kwargs = dict(options.model_kwargs or {})
        if options.graph:
            rng = rng_in_memory(rng, len(x), x.device)
            kwargs = {name: y.detach().clone() if isinstance(y, Tensor) else y for name, y in kwargs.items()}
        self._step = LoopStep(ops, compiled(model, options.compile, x.device), rows, x, rng, options, kwargs)
        self._position = 0  # the index of the next row
        batch = len(self._step.calls[0].twice)
        self._timesteps = rows.device.timesteps(x.device)
        self._graphs = CudaGraphs(x.device) if options.graph else None
        self.whole = options.whole
        if self._graphs is not None and self.whole:
            self._graphs.warn_of_many_nodes(model, len(rows))
        if options.graph and not self.whole:
            self._row = torch.zeros(batch, dtype=torch.int64, device=x.device)
        else:
            # The timesteps of all steps are created at once; the model gets a row of this tensor.
            timesteps = self._timesteps[:, None].expand(-1, batch)
            self._timesteps_at = timesteps.clone(memory_format=torch.contiguous_format).unbind()

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.rows)

    @property
    def doubled(self) -> bool:
        """Whether the model gets the batch twice in a guided step. Then `x` may be a half of a larger tensor."""
        return self._step.doubled

    @property
    def x(self) -> Tensor:
        """The current samples. The step after the next one overwrites them."""
        calls, position = self._step.calls, self._position
        return calls[position].x if position < len(calls) else calls[-1].out

    def restart(
        self,
        rng: Philox | None,
        start: Tensor | Interpolation | None = None,
        noise: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepares another run of a captured loop: writes new samples, seed and conditioning to the graphs' memory."""
        skipped = self.rows.skipped
        if start is None and skipped > 0:
            raise ValueError(f"start is None, expected one: the loop leaves out the first {skipped} steps")
        rng = rng_of_many(rng, self._initial.device)
        x = self._initial.samples(rng, start, noise)
        captured, new = self._step.rng, rng_in_memory(rng, len(x), x.device)
        assert captured.seed is not None and captured.sample_ids is not None and new.seed is not None
        assert new.sample_ids is not None
        checks.per_sample("sample_ids", new.sample_ids, len(x), x.device, 2**56 - 1)
        if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
            raise TypeError(f"model_kwargs is a {type(model_kwargs).__name__}, expected a dict")
        new_kwargs = dict(model_kwargs or {})
        captured_kwargs = self._step.kwargs
        for name, value in new_kwargs.items():
            if not isinstance(captured_kwargs.get(name), Tensor):
                raise ValueError(f"model_kwargs has {name!r}, expected tensors that were given when the loop was made")
            checks.like(f"model_kwargs[{name!r}]", value, "the one given before", captured_kwargs[name])
        captured.seed.copy_(new.seed)
        captured.sample_ids.copy_(new.sample_ids)
        for name, value in new_kwargs.items():
            captured_kwargs[name].copy_(value.detach())
        self._step.restart(x)
        self._position = 0
        if not self.whole:
            self._row.zero_()

    def run(self, progress: bool = False, copies: HostCopies | None = None) -> Iterator[Record]:
        """Yields a Record after each step. A step is taken when its Record is requested."""
        step, timesteps, returns_x0 = self._step, self.rows.timesteps, self._step.options.x0
        for row in _steps(len(self), step.calls[0].x.size(0), progress):
            call = step.calls[row]
            if copies is not None:
                copies.before_overwriting(call.out)
                if "x0_out" in call.inputs:
                    copies.before_overwriting(call.inputs["x0_out"])
            # Gradients are disabled around each step, not around the loop: between two steps the caller's code runs.
            grad_enabled = torch.is_grad_enabled()
            try:
                torch._C._set_grad_enabled(False)  # an interrupt within torch.no_grad() could leave gradients off
                if self._graphs is None:
                    step.take(call, None, row, self._timesteps_at[row])
                else:
                    self._take_captured(self._graphs, call)
            except Exception as error:
                _explain_fractional_timestep(error, timesteps[row])
                raise
            finally:
                torch._C._set_grad_enabled(grad_enabled)
            self._position = row + 1
            yield Record(row, timesteps[row], call.out, call.x0 if returns_x0 else None)

    @torch.no_grad()
    def run_whole(self) -> Tensor:
        """Takes all steps in one CUDA graph and returns the samples."""
        assert self._graphs is not None
        step = self._step

        def take_all() -> None:
            for row, call in enumerate(step.calls):
                step.take(call, None, row, self._timesteps_at[row])

        self._graphs.run("loop", take_all, lambda: partial(step.restart, step.calls[0].x.clone()))
        self._position = len(self)
        return self.x

    def _take_captured(self, graphs: CudaGraphs, call: StepCall) -> None:
        # The step runs once before its capture. The tensors that it both reads and changes are restored after this run:
        # the row's index, and the oldest tensor of history, if the step overwrites that with a new one.
        history_out = [call.inputs["history_out"]] if "history_out" in call.inputs else []
        graphs.run(call, lambda: self._take_next(call), lambda: restorer([self._row, *history_out]))

    def _take_next(self, call: StepCall) -> None:
        """Takes the step of the row whose index is in `self._row`, then adds 1 to it.

        The index is in a tensor, which a CUDA graph reads at each replay.
        """
        self._step.take(call, self._row[: len(call.x)], 0, self._timesteps.index_select(0, self._row))
        self._row.add_(1)


def _explain_fractional_timestep(error: Exception, timestep: int | float) -> None:
    """Adds an explanation to the error of a step, if the model was called with timesteps in a float tensor.

    The cause may be that the model takes integers only. Errors can have notes from Python 3.11 on.
    """
    if isinstance(timestep, float) and hasattr(error, "add_note"):
        error.add_note(
            f"The loop called the model at timestep {timestep:g}, in a float tensor. A model that looks timesteps up "
            "in a table takes integers: loops with another spacing or sampler, or with timesteps=, call it with these."
        )


def _steps(count: int, batch: int, progress: bool) -> Iterable[int]:
    """range(count), with a progress bar if `progress` is true and tqdm is installed. batch: the number of samples."""
    bar = counter(count, "sampling loop time step", disable=None if progress else True)
    return bar if isinstance(bar, range) else _with_rate(bar, count, batch)


def _with_rate(bar: Any, count: int, batch: int) -> Iterator[int]:
    """Yields the steps of a progress bar. The bar shows the rate of images per second, estimated from past steps."""
    begin = time.perf_counter()
    for step in bar:
        yield step
        rate = batch * (step + 1) / count / (time.perf_counter() - begin)
        bar.set_postfix_str(f"{rate:.3g} images/s", refresh=False)
