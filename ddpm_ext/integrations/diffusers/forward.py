"""The forward process of the schedulers that have alphas_cumprod: add_noise and get_velocity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_ext import ops
from ddpm_ext.integrations.diffusers.scheduler import Plan, Scheduler
from ddpm_ext.integrations.shared import misfit
from ddpm_ext.tables.on_device import DeviceTables

__all__ = ["Forward", "affine"]


def _tables(alphas_cumprod: Tensor) -> Plan:
    kept = alphas_cumprod.detach().to("cpu", torch.float64)
    signal, noise = kept.sqrt(), (1 - kept).sqrt()
    return Plan(
        tables=DeviceTables(add_noise=torch.stack([signal, noise], 1), velocity=torch.stack([signal, -noise], 1))
    )


def affine(scheduler: Scheduler, method: str, x: Any, y: Any, table: Any, rows: Any) -> Tensor | None:
    """k0 x + k1 y by a row a sample, in one launch and differentiable; None where diffusers' own code is to run.

    rows: integers (batch,), or one for all, anywhere; table: gives one for a device.
    """
    if not all(isinstance(z, Tensor) for z in (x, y, rows)):
        return None
    why = misfit(x, y)
    if why is None and x.dtype != y.dtype:
        why = "its tensors are of different dtypes"
    if why is None and rows.shape != x.shape[:1] and rows.numel() != 1:
        why = "its timesteps are not one a sample"
    if why is not None:
        scheduler._aside(method, why)
        return None
    if rows.dtype not in (torch.int64, torch.int32):
        return None  # a mask, or refused
    rows = rows.to(x.device, torch.int64)
    if rows.shape != x.shape[:1]:
        rows = rows.reshape(1).repeat(len(x))  # one for all, as for inpainting
    if rows.is_inference() and not torch.is_inference_mode_enabled():
        rows = rows.clone()  # a backward pass keeps them
    try:
        return ops.forward_process(x, table(x.device), rows, noise=y)
    except ValueError:  # timesteps out of range, all else being checked: counted from the end there, or refused
        return None


class Forward(Scheduler):
    """add_noise and get_velocity, whose noise is given: one launch, with gradients."""

    def _affine(self, method: str, x: Any, y: Any, timesteps: Any) -> Tensor | None:
        plan = self._plan(_tables, self.alphas_cumprod)  # type: ignore[attr-defined]
        assert plan.tables is not None
        tables, name = plan.tables, "velocity" if method == "get_velocity" else method
        return affine(self, method, x, y, lambda device: tables.get(name, device, torch.float32), timesteps)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        noisy = self._affine("add_noise", original_samples, noise, timesteps)
        return super().add_noise(original_samples, noise, timesteps) if noisy is None else noisy  # type: ignore[misc]

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        velocity = self._affine("get_velocity", noise, sample, timesteps)
        return super().get_velocity(sample, noise, timesteps) if velocity is None else velocity  # type: ignore[misc]
