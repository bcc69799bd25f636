"""collect, which runs a loop and returns samples of its last or of chosen steps, and CapturedLoop, for many runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.loop.host_copies import HostCopies
from ddpm_ext.loop.interpolation import Interpolation
from ddpm_ext.loop.loop import Loop
from ddpm_ext.loop.options import Record
from ddpm_ext.ops.noise import Philox
from ddpm_ext.ops.result_memory import empty_like


def _recorded_steps(record: str | int | Sequence[int], steps: int) -> set[int] | None:
    """The steps to record; None for record="last", whose result is a tensor."""
    if isinstance(record, str):
        if record not in ("all", "last", "x0"):
            raise ValueError(
                f"record is {record!r}, expected 'all', 'last', 'x0', an int k for every k-th step, or steps"
            )
        return None if record == "last" else set(range(steps))
    if isinstance(record, Sequence):
        stop_name = f"{steps}, there being {steps} steps"
        chosen = [checks.integer("record's step", step, steps, stop_name) for step in record]
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"record is {record!r}, expected each step once")
        return set(chosen)
    interval = checks.integer("record", record, 2**63, "2^63", start=1)
    return {*range(interval - 1, steps, interval), steps - 1}


def collect(
    make: Callable[[], Loop],
    steps: int,
    *,
    whole: bool,
    record: str | int | Sequence[int],
    callback: Callable[[Record], object] | None,
    progress: bool,
) -> list[np.ndarray] | Tensor:
    """Runs a loop to its end, or until `callback` returns true: see GaussianDiffusion.p_sample_loop.

    Args:
        make: creates the loop.
        steps: the number of its steps.
        whole: whether all steps are one CUDA graph.
    """
    chosen = _recorded_steps(record, steps)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback is {callback!r}, expected a function of a Record")
    if whole:
        if callback is not None or chosen is not None:
            raise ValueError("graph is 'loop', expected record='last' and no callback: nothing is seen in between")
        return make().run_whole().clone()
    loop = make()
    copies = None if chosen is None else HostCopies(loop.x.device)
    lists_steps = isinstance(record, Sequence) and not isinstance(record, str)
    for state in loop.run(progress, copies):
        stop = callback is not None and callback(state)
        if copies is not None and chosen is not None and (state.step in chosen or (stop and not lists_steps)):
            samples = state.x0 if record == "x0" else state.x_t
            assert samples is not None
            copies.add(samples)
        if stop:
            break
    if copies is not None:
        return copies.arrays()
    # With doubled batches, x_t may be a half of a larger tensor. The caller gets a copy, so that this tensor is freed.
    return empty_like(state.x_t).copy_(state.x_t) if loop.doubled else state.x_t


class CapturedLoop:
    """A loop that can run many times, with other seeds and conditioning, in the same memory.

    It replays CUDA graphs of single steps, or one graph of all steps. GaussianDiffusion.capture returns it.

    Examples:
        >>> captured = gd.capture(model, images.shape, steps=10, device="cuda")
        >>> first, second = captured(Philox(0)).clone(), captured(Philox(1))
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def __call__(
        self,
        rng: Philox | None = None,
        *,
        start: Tensor | Interpolation | None = None,
        noise: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Runs the loop. Returns the samples in a new tensor.

        Args:
            rng: the seed and sample ids. With None, torch's default CPU generator draws a seed.
            start, noise: see p_sample_loop.
            model_kwargs: tensors whose values replace those of the tensors given to `capture`, in this and all later
                calls. None, or a missing name, changes nothing.
            progress: whether to show a progress bar. A graph of all steps has none.

        Raises:
            TypeError, ValueError: see p_sample_loop.
        """
        self._loop.restart(rng, start, noise, model_kwargs)
        if self._loop.whole:
            return self._loop.run_whole().clone()
        for _ in self._loop.run(progress):
            pass
        return self._loop.x.clone()
