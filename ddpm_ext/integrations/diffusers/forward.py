"""The fused add_noise, scale_noise and get_velocity of diffusers' schedulers.

Each of these methods returns k0 x + k1 noise, with numbers k0 and k1 for each timestep. To get the numbers, diffusers'
method runs on trial samples, once for each setting. diffusers looks up the timesteps of a batch one by one, and waits
for the GPU at each timestep. This module looks up all timesteps of a batch at once, on their device.
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

# {method: its parameters}
FORWARD = {
    "add_noise": ["original_samples", "noise", "timesteps"],
    "get_velocity": ["sample", "noise", "timesteps"],
    "scale_noise": ["sample", "timestep", "noise"],
}

UNKNOWN_TIMESTEP = -12345  # a timestep that no scheduler has
STEP, TIMESTEP, LISTED = "step", "timestep", "listed"


class Weights(NamedTuple):
    """The factors k0 and k1 of each timestep.

    Attributes:
        tables: "weights", (rows, 2), has k0 and k1. If `row_meaning` is LISTED, "timesteps", (rows - 1,), has the
            timesteps of all rows but the last.
        row_meaning: STEP: row i is for step i of a loop, whatever its timestep. TIMESTEP: row i is for timestep i.
            LISTED: row i is for the timestep at index i of "timesteps", and the last row is for all other timesteps.
        is_total: False if diffusers rejects timesteps that are not listed. Then the last row has NaN.
    """

    tables: DeviceTables
    row_meaning: str
    is_total: bool = True

    def rows(self, timesteps: Tensor) -> Tensor:
        """The row of each timestep, on the timesteps' device.

        Raises Fallback for timesteps of a dtype or shape that has no fused form. Also for an unlisted timestep that
        diffusers rejects, but not on a GPU: no timestep is read back.
        """
        if self.row_meaning == TIMESTEP:
            if timesteps.dtype not in (torch.int64, torch.int32):
                raise Fallback  # diffusers accepts a boolean mask, and rejects other dtypes
            return timesteps
        if timesteps.dim() != 1:
            raise Fallback
        listed = self.tables.get("timesteps", timesteps.device, torch.float64)
        is_listed, rows = (listed == timesteps[:, None]).byte().max(1)
        if not self.is_total and is_listed.is_cpu and not is_listed.all():
            raise Fallback
        return torch.where(is_listed.bool(), rows, len(listed))


def forward_trial(scheduler: Any, method: str, timesteps: Tensor) -> Tensor:
    """k0 and k1 of each timestep, (timesteps, 2), from two calls of diffusers' method, for x = 1 and for noise = 1.

    Raises Fallback if the method raises an error or changes the scheduler's _step_index.
    """
    ones = torch.ones(len(timesteps), 1, 1, 1, dtype=torch.float64, device="cpu")
    named_timesteps = {"timestep" if method == "scale_noise" else "timesteps": timesteps}
    index = scheduler.__dict__.get("_step_index")
    try:
        columns = [
            getattr(scheduler, method)(x, noise=ones - x, **named_timesteps).reshape(-1) for x in (ones, 0 * ones)
        ]
    except Exception:
        raise Fallback from None
    if scheduler.__dict__.get("_step_index") is not index:
        raise Fallback  # the method advances the scheduler
    return torch.stack(columns, 1)


def _weights(cls: Any, state: dict[str, Any], method: str, in_loop: bool, dtype: torch.dtype) -> Weights:
    """The weights of a scheduler of diffusers' class `cls` with this state, for timesteps of `dtype`.

    If `in_loop` and the method reads the loop's step in place of the timestep, the rows are for the steps of a loop.
    Otherwise they are for all training timesteps, if `dtype` is no float type, the scheduler has alphas_cumprod and the
    method accepts these timesteps. If not, they are for the loop's timesteps.
    """
    scheduler = new(cls)
    scheduler.__dict__.update(state)
    timesteps = scheduler.timesteps.cpu()
    if "_step_index" in state:
        scheduler._step_index = None
        forward_trial(scheduler, method, timesteps[:1])  # raises Fallback if the method advances the scheduler
    if in_loop:
        rows = []
        for i in range(len(scheduler.sigmas)):
            scheduler._step_index = i
            rows.append(forward_trial(scheduler, method, timesteps[:1]))
        table = torch.cat(rows)
        if not (table == table[0]).all():  # equal rows: the method reads the timestep, not the step
            return Weights(DeviceTables(weights=table), STEP)
    if "alphas_cumprod" in state and not dtype.is_floating_point:
        trial = attempt(forward_trial, scheduler, method, torch.arange(len(scheduler.alphas_cumprod), device="cpu"))
        if not isinstance(trial, Fallback):
            return Weights(DeviceTables(weights=trial), TIMESTEP)
    timesteps = timesteps.to(torch.promote_types(timesteps.dtype, dtype))
    weights = forward_trial(scheduler, method, timesteps)
    other_weights = attempt(
        forward_trial, scheduler, method, torch.tensor([UNKNOWN_TIMESTEP], dtype=timesteps.dtype, device="cpu")
    )
    if isinstance(other_weights, Fallback):
        other_weights = torch.full_like(weights[:1], torch.nan)
    tables = DeviceTables(weights=torch.cat([weights, other_weights]), timesteps=timesteps)
    return Weights(tables, LISTED, not bool(other_weights.isnan().any()))


class Forward(Scheduler):
    """A mixin whose add_noise, scale_noise and get_velocity take one launch each, and record gradients.

    Their callers pass the noise, so it is the same with noise "torch" and "philox".
    """

    def _forward(self, method: str, x: Any, noise: Any, timesteps: Any) -> Tensor:
        state = vars(self)
        scheduler_timesteps: Any = state.get("timesteps")
        if not are_tensors(x, noise, timesteps, scheduler_timesteps) or scheduler_timesteps.dim() != 1:
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
        options = method, state.get("_begin_index") is not None and "sigmas" in state, timesteps.dtype
        # Of the scheduler's state, the weights depend on nothing but these three tensors and the options.
        key = (_weights, cls, options), scheduler_timesteps, state.get("sigmas"), state.get("alphas_cumprod")
        weights = self._cached(key, _weights, (cls, state, *options))
        if weights.row_meaning == STEP:
            step = state["_begin_index"] if state.get("_step_index") is None else state["_step_index"]
            rows = torch.full(x.shape[:1], step, device=x.device)
        else:
            rows = weights.rows(timesteps).to(x.device, torch.int64)
        if rows.shape != x.shape[:1]:
            rows = rows.reshape(1).repeat(len(x))  # one timestep for all samples, as inpainting pipelines pass it
        if rows.is_inference() and not torch.is_inference_mode_enabled():
            rows = rows.clone()  # a backward pass can't save an inference tensor
        try:
            table = weights.tables.get("weights", x.device, torch.float32)
            return ops.forward_process(x, table, rows, noise=noise)
        except ValueError:
            # All else was checked, so a row is out of range. diffusers counts a negative one from the end, and rejects
            # others.
            raise Fallback from None

    def _add_noise(self, original_samples: Any, noise: Any, timesteps: Any) -> Tensor:
        return self._forward("add_noise", original_samples, noise, timesteps)

    def _get_velocity(self, sample: Any, noise: Any, timesteps: Any) -> Tensor:
        return self._forward("get_velocity", sample, noise, timesteps)

    def _scale_noise(self, sample: Any, timestep: Any, noise: Any = None) -> Tensor:
        return self._forward("scale_noise", sample, noise, timestep)
