"""DDIM inversion: the rows that lead an image to the noise from which a DDIM loop returns to the image."""

from __future__ import annotations

from dataclasses import replace

import torch

from ddpm_ext.process.process import Process
from ddpm_ext.tables.samplers import ddim_inverse
from ddpm_ext.tables.spacing import spaced_grid
from ddpm_ext.tables.step_table import StepTable


def inversion_table(process: Process, steps: int | None = None, spacing: str | None = None) -> StepTable:
    """The rows that lead an image to noise, from which "ddim" with the same steps and spacing returns to the image.

    The rows go up through the levels of that loop and end where it begins. The image counts as a sample at timestep 0,
    or at the loop's last level if that is lower. p_sample_loop takes the table as `sampler`, and the image as `noise`.

    Args:
        process: the process of the model, whose prediction must not be "x_prev".
        steps, spacing: as p_sample_loop's.

    Raises:
        TypeError, ValueError: `steps` or `spacing` is unknown or out of range, or the only level is that of the image.

    Examples:
        >>> up = inversion_table(gd, steps=10)
        >>> options = {"record": "last", "progress": False, "clip_denoised": False}
        >>> noise = gd.p_sample_loop(model, images.shape, sampler=up, noise=images, **options)
        >>> again = gd.p_sample_loop(model, images.shape, sampler="ddim", steps=10, noise=noise, **options)
    """
    down = spaced_grid(process.alphas_cumprod, process.betas, steps, spacing, scale=process.schedule.scale)
    timestep, levels = down.timestep.flip(0), down.now.flip(0)
    if levels[0] < process.alphas_cumprod[0]:
        timestep = torch.cat([timestep.new_zeros(1), timestep])
        levels = torch.cat([process.alphas_cumprod[:1], levels])
    if len(levels) < 2:
        raise ValueError(f"steps is {steps} with spacing {spacing!r}, which begins at timestep 0, expected a later one")
    up = replace(down, timestep=timestep[:-1], alphas_cumprod=levels, betas=1 - levels[:-1] / levels[1:])
    return process.for_model(ddim_inverse(up, prediction=process.prediction))
