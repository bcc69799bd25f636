"""The forward process of schedulers without a mixin of their own: add_noise, scale_noise and get_velocity.

Each is k0 x + k1 noise with two numbers for each timestep, which diffusers' own method tells, once for each setting.
It looks the timesteps of a batch up one by one, and waits for a GPU at each. Here they are looked up on their device,
all at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.integrations.diffusers.forward import weighted_sum
from ddpm_ext.integrations.diffusers.scheduler import Scheduler, are_tensors
from ddpm_ext.integrations.fallback import Fallback, with_fallback
from ddpm_ext.integrations.shared import new, peer_class
from ddpm_ext.tables.on_device import DeviceTables

__all__ = ["FORWARD", "TracedForward"]

# The methods, and their parameters.
FORWARD = {
    "add_noise": ["original_samples", "noise", "timesteps"],
    "get_velocity": ["sample", "noise", "timesteps"],
    "scale_noise": ["sample", "timestep", "noise"],
}

ELSEWHERE = -12345  # no scheduler's timestep
READ = ("timesteps", "sigmas", "alphas_cumprod")  # the tensors that the numbers follow from


class Weights(NamedTuple):
    """k0 and k1 at some timesteps.

    Attributes:
        tables: "weights", (rows, 2), and "timesteps", (rows - 1,), those of all rows but the last one, which is for any
            other timestep: NaN where diffusers raises an error of it. No "timesteps" where row t is timestep t's.
        is_total: whether the last row is not NaN.
    """

    tables: DeviceTables
    is_total: bool

    def rows(self, timesteps: Tensor) -> Tensor:
        """The row of each timestep, on their device. Raises Fallback where there is none; not on a GPU, where no
        timestep is read."""
        own = self.tables.find("timesteps", timesteps.device, torch.float64)
        if own is None:
            return timesteps
        found, rows = (own == timesteps[:, None]).byte().max(1)
        if not self.is_total and found.is_cpu and not found.all():
            raise Fallback
        return torch.where(found.bool(), rows, len(own))


def _trial(scheduler: Any, method: str, timesteps: Tensor) -> Tensor:
    """(timesteps, 2), k0 and k1, by diffusers' own method."""
    ones = torch.ones(len(timesteps), 1, 1, 1, dtype=torch.float64, device="cpu")
    named = {"timestep" if method == "scale_noise" else "timesteps": timesteps}
    place = scheduler.__dict__.get("_step_index")
    columns = [getattr(scheduler, method)(x, noise=ones - x, **named).reshape(-1) for x in (ones, 0 * ones)]
    if scheduler.__dict__.get("_step_index") is not place:
        raise Fallback  # it moves the scheduler's step
    return torch.stack(columns, 1)


def _of_schedule(scheduler: Any, method: str) -> Weights:
    """At all timesteps that the scheduler was trained on. Raises Fallback where it takes others alone."""
    try:
        weights = _trial(scheduler, method, torch.arange(len(scheduler.alphas_cumprod), device="cpu"))
    except Exception:
        raise Fallback from None
    return Weights(DeviceTables(weights=weights), True)


def _of_loop(scheduler: Any, method: str) -> Weights:
    """At the timesteps of the scheduler's loop."""
    own = scheduler.timesteps.cpu()
    try:
        weights = _trial(scheduler, method, own)
    except Exception:
        raise Fallback from None
    try:
        other = _trial(scheduler, method, torch.tensor([ELSEWHERE], dtype=own.dtype, device="cpu"))
    except Exception:
        other = torch.full((1, 2), torch.nan, dtype=torch.float64, device="cpu")
    tables = DeviceTables(weights=torch.cat([weights, other]), timesteps=own)
    return Weights(tables, not bool(other.isnan().any()))


def _of_steps(scheduler: Any, method: str) -> Weights | None:
    """At each step of a loop, whatever the timestep; None where the timestep matters in a loop, too."""
    weights, own = [], scheduler.timesteps[:1].cpu()
    for i in range(len(scheduler.sigmas)):
        scheduler._step_index = i
        weights.append(_trial(scheduler, method, own))
    table = torch.cat(weights)
    return None if bool((table == table[0]).all()) else Weights(DeviceTables(weights=table), True)


class TracedForward(Scheduler):
    """add_noise, scale_noise and get_velocity, whose noise is given: one launch each, with gradients."""

    def _numbers(self, method: str, make: Callable[[Any, str], Any]) -> Any:
        """make(scheduler, method), from the cache where the settings are there."""
        state = vars(self)

        def of_copy() -> Any:
            scheduler = new(peer_class(type(self)))
            scheduler.__dict__.update(state)
            return make(scheduler, method)

        return self._cached((make, method, *(state.get(name) for name in READ)), of_copy)

    def _forward(self, method: str, x: Any, noise: Any, timesteps: Any) -> Tensor:
        state = vars(self)
        own: Any = state.get("timesteps")
        if not are_tensors(x, noise, timesteps, own) or timesteps.dim() != 1 or own.dim() != 1:
            raise Fallback
        if state.get("_begin_index") is not None and "sigmas" in state:
            steps = self._numbers(method, _of_steps)
            if steps is not None:
                at = state["_begin_index"] if state.get("_step_index") is None else state["_step_index"]
                rows = torch.full((len(timesteps),), at, device=x.device)
                return weighted_sum(x, noise, rows, lambda: steps.tables, "weights")
        found = None
        if "alphas_cumprod" in state and not timesteps.is_floating_point():
            with contextlib.suppress(Fallback):
                found = self._numbers(method, _of_schedule)
        if found is None:
            found = self._numbers(method, _of_loop)
            timesteps = timesteps.to(own.dtype) if own.is_floating_point() else timesteps
        rows = found.rows(timesteps)
        return weighted_sum(x, noise, rows, lambda: found.tables, "weights")

    @with_fallback("add_noise", compiles=False)
    def _add_noise(self, original_samples: Any, noise: Any, timesteps: Any) -> Tensor:
        return self._forward("add_noise", original_samples, noise, timesteps)

    @with_fallback("get_velocity", compiles=False)
    def _get_velocity(self, sample: Any, noise: Any, timesteps: Any) -> Tensor:
        return self._forward("get_velocity", sample, noise, timesteps)

    @with_fallback("scale_noise", compiles=False)
    def _scale_noise(self, sample: Any, timestep: Any, noise: Any = None) -> Tensor:
        return self._forward("scale_noise", sample, noise, timestep)
