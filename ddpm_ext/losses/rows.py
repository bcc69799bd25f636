"""The rows of a training loss: the model's target and the weight of each timestep."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial

import torch
from torch import Tensor

from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.base.checks import is_plain
from ddpm_ext.process.process import Process
from ddpm_ext.tables.on_device import DeviceTables
from ddpm_ext.tables.weightings import check_given, names, weights

CACHED = 8  # the largest number of cached tables for callers' weights, for bounds and for input perturbations together


def _log_variance(process: Process) -> Tensor:
    """l0 and l1 of the log-variance l0 + l1 v of p(x_{t-1} | x_t), with v the model's output for it: (timesteps, 2)."""
    cpu, dtype = process.betas.device, process.betas.dtype
    if process.variance_entry.learned:
        return process.tables.get("learned_log_variance", cpu, dtype)
    fixed = process.tables.get("finite_log_variance", cpu, dtype)
    return torch.stack([fixed, torch.zeros_like(fixed)], 1)


def _bound(process: Process) -> Tensor:
    """The columns of a row for the variational bound, (timesteps, 4). csrc/core/loss.h has the equation.

    At timestep 0, whose term is the decoder's (the likelihood of the image's 8-bit values), the columns are l0, l1,
    mean_slope and 1. At the others they are l0 minus the posterior's log-variance, l1, mean_slope^2 over the
    posterior's variance, and 0. The means of the posterior and of the model differ by the model's error times
    mean_slope.
    """
    mean_slope = process.prediction_entry.mean_slope(process.levels) * process.magnitude_before
    l0, l1 = _log_variance(process).unbind(1)
    posterior = process.tables.get("posterior_log_variance_clipped", process.betas.device, process.betas.dtype)
    decoder = torch.arange(process.timesteps, device="cpu") == 0
    return torch.stack(
        [
            torch.where(decoder, l0, l0 - posterior),
            l1,
            torch.where(decoder, mean_slope, mean_slope**2 * (-posterior).exp()),
            decoder.double(),
        ],
        1,
    )


def _rows(target: Tensor, weight: Tensor) -> Tensor:
    """The rows for diffusion_loss, (timesteps, 4): the target's factors k0 and k1, the weight and a zero."""
    return torch.cat([target, torch.stack([weight, torch.zeros_like(weight)], 1)], 1)


class LossRows:
    """The rows of the losses of a process: tables with the target and the weight of each timestep, on every device.

    The rows of named weightings are made once. Rows for callers' weights, rows with the bound and those of input
    perturbations are cached, up to CACHED tables in all. After an operator of torch has written to a caller's weights,
    `get` makes new rows for them.

    Attributes:
        bounded: whether the variational bound is finite. With the prediction "eps" it is infinite if the last
            alphas_cumprod is 0, where x_0 does not follow from eps.
        needs_x_start, needs_noise: whether the target depends on x_start, and on the noise.
    """

    def __init__(self, process: Process) -> None:
        self._alphas_and_prediction = process.alphas_cumprod, process.prediction
        self.bounded = process.prediction_entry.without_signal or bool(process.alphas_cumprod[-1] > 0)
        target, self._names = (
            torch.stack(process.prediction_entry.target(process.levels), 1),
            names(*self._alphas_and_prediction),
        )
        self.needs_x_start, self.needs_noise = (target != 0).any(0).tolist()
        named_rows = {name: _rows(target, weights(*self._alphas_and_prediction, name)) for name in self._names}
        self._named = DeviceTables(**named_rows, bound=_bound(process), noise=process.schedule.noise)
        self._by_key: BoundedCache[tuple[DeviceTables, object]] = BoundedCache(CACHED)

    def get(
        self,
        weighting: str | Tensor,
        device: torch.device,
        dtype: torch.dtype,
        error: bool = True,
        bound: float | None = None,
    ) -> Tensor:
        """The rows of a weighting, (timesteps, 4): k0, k1, the weight and a zero.

        With a bound they are (timesteps, 8): k0, k1, the weight, the factor `bound` and the columns of _bound.

        Args:
            error: with a bound, whether the loss has the prediction's weighted error too. If not, the weight is 0.
            bound: the factor of a timestep's term of the variational bound in nats, or None for no bound.

        Raises:
            TypeError, ValueError: see ddpm_ext.tables.weightings.weights.
        """
        if isinstance(weighting, Tensor):
            check_given(self._alphas_and_prediction[0], weighting)
        elif isinstance(weighting, str) and weighting in self._names and bound is None:
            return self._named.get(weighting, device, dtype)
        name: object = weighting if isinstance(weighting, str) else None
        # Rows of inference tensors are not cached: these have no version, so a later write could not be noticed.
        if isinstance(weighting, Tensor) and not (torch.compiler.is_compiling() or weighting.is_inference()):
            name = id(weighting), weighting._version
        key = None if name is None else (name, error, bound)
        return self._cached(key, partial(self._make, weighting, error, bound), weighting, device, dtype)

    def _cached(
        self, key: Hashable, make: Callable[..., Tensor], keep_alive: object, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """The rows that `make` returns, computed in float64 and rounded to `dtype`: cached by `key`, unless it is None.

        Args:
            make: (device, dtype) -> the rows.
            keep_alive: the object whose id is in the key, if there is one. The cache references it: otherwise Python
                could free it and give its id to a new object.
        """
        if torch.compiler.is_compiling():
            # A compiled graph can't notice writes to the weights, so it makes the rows in each call. Like cached rows,
            # they are computed in float64 and then rounded, so that both have the same bits.
            return make(device, torch.float64).to(dtype)
        entry = None if key is None else self._by_key.get(key)
        if entry is None:
            in_float64 = torch.device("cpu"), torch.float64
            entry = new_entry = DeviceTables(rows=make(*in_float64)), keep_alive
            # Tensors that were created in a function transform or a fake mode can't be used after it, so they are not
            # cached.
            if key is not None and is_plain(new_entry[0].get("rows", *in_float64)):
                entry = self._by_key.get_or_make(key, lambda: new_entry)
        return entry[0].get("rows", device, dtype)

    def _make(
        self, weighting: str | Tensor, error: bool, bound: float | None, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        if isinstance(weighting, str) and weighting in self._names:
            rows = self._named.get(weighting, device, dtype)
        else:
            target = self._named.get("simple", device, dtype)[:, :2]
            rows = _rows(target, weights(*self._alphas_and_prediction, weighting).to(device, dtype))
        if bound is None:
            return rows
        weight = rows[:, 2:3] if error else torch.zeros_like(rows[:, 2:3])
        # A product with ones, not torch.full: this way, torch.compile makes one graph for all values of `bound`.
        factor = torch.ones_like(weight) * bound
        return torch.cat([rows[:, :2], weight, factor, self._named.get("bound", device, dtype)], 1)

    def perturbation(self, scale: float, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The rows with which forward_process adds an input perturbation to x_t, (timesteps, 2).

        They are 1, and `scale` times the standard deviation of x_t's noise.
        """

        def make(device: torch.device, dtype: torch.dtype) -> Tensor:
            noise = self._named.get("noise", device, dtype)
            return torch.stack([torch.ones_like(noise), noise * scale], 1)

        return self._cached(("perturbation", scale), make, None, device, dtype)
