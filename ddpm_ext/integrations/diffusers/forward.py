"""The forward process of the schedulers that have alphas_cumprod: add_noise and get_velocity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_ext import ops
from ddpm_ext.integrations.diffusers.scheduler import Scheduler, are_tensors
from ddpm_ext.integrations.fallback import Fallback, with_fallback
from ddpm_ext.integrations.tensors import check_tensors
from ddpm_ext.tables.on_device import DeviceTables

__all__ = ["Forward", "weighted_sum"]


def _tables(alphas_cumprod: Tensor) -> DeviceTables:
    levels = alphas_cumprod.detach().to("cpu", torch.float64)
    signal, noise = levels.sqrt(), (1 - levels).sqrt()
    return DeviceTables(add_noise=torch.stack([signal, noise], 1), velocity=torch.stack([signal, -noise], 1))


def weighted_sum(x: Any, y: Any, rows: Any, tables: Callable[[], DeviceTables], name: str) -> Tensor:
    """k0 x + k1 y in one launch, differentiable, with a row of weights for each sample.

    Raises Fallback where x and y are not alike, or rows are none of the table's.

    Args:
        x, y: (batch, ...).
        rows: integers, (batch,) or one for all samples, on any device.
        tables, name: what gives the tables, and which of them, (rows, 2).
    """
    if not are_tensors(x, y, rows):
        raise Fallback
    check_tensors(x, y)
    if x.dtype != y.dtype:
        raise Fallback("its tensors are of different dtypes")
    if rows.shape != x.shape[:1] and rows.numel() != 1:
        raise Fallback("its timesteps are not one a sample")
    if rows.dtype not in (torch.int64, torch.int32):
        raise Fallback  # diffusers takes a mask, and rejects the rest
    rows = rows.to(x.device, torch.int64)
    if rows.shape != x.shape[:1]:
        rows = rows.reshape(1).repeat(len(x))  # one for all samples, as inpainting gives it
    if rows.is_inference() and not torch.is_inference_mode_enabled():
        rows = rows.clone()  # a backward pass keeps them
    try:
        return ops.forward_process(x, tables().get(name, x.device, torch.float32), rows, noise=y)
    except ValueError:
        # All else was checked, so a row is out of range: diffusers counts it from the end, or rejects it.
        raise Fallback from None


class Forward(Scheduler):
    """add_noise and get_velocity, whose noise is given: one launch each, with gradients."""

    alphas_cumprod: Tensor

    def _forward_tables(self) -> DeviceTables:
        return self._rows(_tables, self.alphas_cumprod)

    @with_fallback()
    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return weighted_sum(original_samples, noise, timesteps, self._forward_tables, "add_noise")

    @with_fallback()
    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return weighted_sum(noise, sample, timesteps, self._forward_tables, "velocity")
