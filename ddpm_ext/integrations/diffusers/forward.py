"""The forward process: add_noise, scale_noise and get_velocity.

Each is k0 x + k1 noise with two numbers for each timestep, which diffusers' own method tells, once for each setting.
It looks the timesteps of a batch up one by one, and waits for a GPU at each. Here they are looked up on their device,
all at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext import ops
from ddpm_ext.integrations.diffusers.scheduler import Scheduler, are_tensors
from ddpm_ext.integrations.fallback import Fallback, attempt
from ddpm_ext.integrations.library_code import foreign_method
from ddpm_ext.integrations.shared import new, peer_class
from ddpm_ext.integrations.tensors import check_tensors
from ddpm_ext.tables.on_device import DeviceTables

# The methods, and their parameters.
FORWARD = {
    "add_noise": ["original_samples", "noise", "timesteps"],
    "get_velocity": ["sample", "noise", "timesteps"],
    "scale_noise": ["sample", "timestep", "noise"],
}

ELSEWHERE = -12345  # no scheduler's timestep
STEP, TIMESTEP, LISTED = "step", "timestep", "listed"


class Weights(NamedTuple):
    """k0 and k1, the table "weights" of (rows, 2).

    Attributes:
        tables: that one, and "timesteps" of (rows - 1,) where a loop's timesteps have rows.
        of: what has row i: a loop's STEP i, whatever its timestep; the TIMESTEP i; or the i-th one of the table
            "timesteps", LISTED. Of these, the last row is for any other timestep.
        is_total: whether there is a number for any other timestep. NaN stands where diffusers raises an error of it.
    """

    tables: DeviceTables
    of: str
    is_total: bool = True

    def rows(self, timesteps: Tensor) -> Tensor:
        """The row of each timestep, on their device. Raises Fallback where there is none; not on a GPU, where no
        timestep is read."""
        if self.of == TIMESTEP:
            if timesteps.dtype not in (torch.int64, torch.int32):
                raise Fallback  # diffusers takes a mask, and rejects the rest
            return timesteps
        if timesteps.dim() != 1:
            raise Fallback
        listed = self.tables.get("timesteps", timesteps.device, torch.float64)
        is_listed, rows = (listed == timesteps[:, None]).byte().max(1)
        if not self.is_total and is_listed.is_cpu and not is_listed.all():
            raise Fallback
        return torch.where(is_listed.bool(), rows, len(listed))


def forward_trial(scheduler: Any, method: str, timesteps: Tensor) -> Tensor:
    """(timesteps, 2), k0 and k1, by diffusers' own method. Raises Fallback where it raises an error."""
    ones = torch.ones(len(timesteps), 1, 1, 1, dtype=torch.float64, device="cpu")
    named = {"timestep" if method == "scale_noise" else "timesteps": timesteps}
    index = scheduler.__dict__.get("_step_index")
    try:
        columns = [getattr(scheduler, method)(x, noise=ones - x, **named).reshape(-1) for x in (ones, 0 * ones)]
    except Exception:
        raise Fallback from None
    if scheduler.__dict__.get("_step_index") is not index:
        raise Fallback  # it moves the scheduler's step
    return torch.stack(columns, 1)


def _weights(cls: Any, state: dict[str, Any], method: str, in_loop: bool, dtype: torch.dtype) -> Weights:
    """Those for timesteps of a dtype, where a scheduler of diffusers' class has this state: of a loop's steps if it has
    begun, of all timesteps that the scheduler was trained on, or where it takes others alone, of its own."""
    scheduler = new(cls)
    scheduler.__dict__.update(state)
    own = scheduler.timesteps.cpu()
    if "_step_index" in state:
        scheduler._step_index = None
        forward_trial(scheduler, method, own[:1])  # raises Fallback where it moves the step
    if in_loop:
        rows = []
        for i in range(len(scheduler.sigmas)):
            scheduler._step_index = i
            rows.append(forward_trial(scheduler, method, own[:1]))
        table = torch.cat(rows)
        if not (table == table[0]).all():  # else the timestep matters in a loop, too
            return Weights(DeviceTables(weights=table), STEP)
    if "alphas_cumprod" in state and not dtype.is_floating_point:
        of_all = attempt(forward_trial, scheduler, method, torch.arange(len(scheduler.alphas_cumprod), device="cpu"))
        if not isinstance(of_all, Fallback):
            return Weights(DeviceTables(weights=of_all), TIMESTEP)
    own = own.to(torch.promote_types(own.dtype, dtype))
    weights = forward_trial(scheduler, method, own)
    other = attempt(forward_trial, scheduler, method, torch.tensor([ELSEWHERE], dtype=own.dtype, device="cpu"))
    if isinstance(other, Fallback):
        other = torch.full_like(weights[:1], torch.nan)
    tables = DeviceTables(weights=torch.cat([weights, other]), timesteps=own)
    return Weights(tables, LISTED, not bool(other.isnan().any()))


class Forward(Scheduler):
    """add_noise, scale_noise and get_velocity, whose noise is given: one launch each, with gradients."""

    def _forward(self, method: str, x: Any, noise: Any, timesteps: Any) -> Tensor:
        state = vars(self)
        own: Any = state.get("timesteps")
        if not are_tensors(x, noise, timesteps, own) or own.dim() != 1:
            raise Fallback
        check_tensors(x, noise)
        if x.dtype != noise.dtype:
            raise Fallback("its tensors are of different dtypes")
        if timesteps.shape != x.shape[:1] and timesteps.numel() != 1:
            raise Fallback("its timesteps are not one a sample")
        cls = peer_class(type(self))
        foreign = foreign_method(cls, state)
        if foreign is not None:
            raise Fallback(f"its {foreign} is not diffusers' own code")
        of = method, state.get("_begin_index") is not None and "sigmas" in state, timesteps.dtype
        key = (_weights, cls, of), own, state.get("sigmas"), state.get("alphas_cumprod")  # what the numbers follow from
        weights = self._cached(key, _weights, (cls, state, *of))
        if weights.of == STEP:
            at = state["_begin_index"] if state.get("_step_index") is None else state["_step_index"]
            rows = torch.full(x.shape[:1], at, device=x.device)
        else:
            rows = weights.rows(timesteps).to(x.device, torch.int64)
        if rows.shape != x.shape[:1]:
            rows = rows.reshape(1).repeat(len(x))  # one for all samples, as inpainting gives it
        if rows.is_inference() and not torch.is_inference_mode_enabled():
            rows = rows.clone()  # a backward pass keeps them
        try:
            table = weights.tables.get("weights", x.device, torch.float32)
            return ops.forward_process(x, table, rows, noise=noise)
        except ValueError:
            # All else was checked, so a row is out of range: diffusers counts it from the end, or rejects it.
            raise Fallback from None

    def _add_noise(self, original_samples: Any, noise: Any, timesteps: Any) -> Tensor:
        return self._forward("add_noise", original_samples, noise, timesteps)

    def _get_velocity(self, sample: Any, noise: Any, timesteps: Any) -> Tensor:
        return self._forward("get_velocity", sample, noise, timesteps)

    def _scale_noise(self, sample: Any, timestep: Any, noise: Any = None) -> Tensor:
        return self._forward("scale_noise", sample, noise, timestep)
