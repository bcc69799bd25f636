"""The training loss with its slope by the operator itself, without autograd around it."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_ext.base.checks import split_t
from ddpm_ext.ops.extension import C
from ddpm_ext.ops.loss_kinds import LOSSES, REDUCTIONS
from ddpm_ext.ops.noise import STREAM_FORWARD, Philox, noise_arguments

__all__ = ["loss_and_slope", "loss_rows"]


def loss_rows(count: int, variational: bool = False) -> Tensor:
    """(count, 4) of random numbers, on the CPU, or (count, 8): some without x_start, some without noise, and some of
    the decoder."""
    rows = torch.randn(count, 8 if variational else 4, generator=torch.Generator().manual_seed(2))
    rows[::3, 0] = rows[1::4, 1] = 0
    if variational:
        rows[:, 7] = (torch.arange(count) % 4 == 2).float()
    else:
        rows[:, 3] = 0
    return rows


def loss_and_slope(
    model_output: Tensor,
    x_start: Tensor | None,
    table: Tensor,
    t: int | Tensor,
    *,
    loss: str = "mse",
    delta: float = 1.0,
    noise: Tensor | None = None,
    rng: Philox | None = None,
    reduction: str = "none",
    want_slope: bool = True,
    variational: bool = False,
    detach_mean: bool = False,
) -> tuple[Tensor, Tensor]:
    """Arguments as diffusion_loss's; the slope is what its backward pass starts from, of no elements if unwanted."""
    row, index = split_t(t)
    noise, _, *rng_arguments = noise_arguments(noise, rng, True, STREAM_FORWARD)
    how = (LOSSES.index(loss), delta, noise, *rng_arguments, REDUCTIONS.index(reduction), want_slope)
    return C.diffusion_loss(model_output, x_start, table, row, index, *how, variational, detach_mean)
