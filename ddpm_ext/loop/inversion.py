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

    The rows go through the levels of the "ddim" loop in reverse order and end at the level where it begins. The image
    counts as a sample at timestep 0, or at the level where the "ddim" loop's last step starts, if that has less noise.
    p_sample_loop takes the table as `sampler`, and the image as `noise`.

    Args:
        process: the process of the model, whose prediction must not be "x_prev".
        steps, spacing: see p_sample_loop.

    Raises:
        TypeError, ValueError: `steps` or `spacing` is unknown or out of range, the prediction is "x_prev", or the
            "ddim" loop has no level with more noise than the image's.

    Examples:
        >>> table = inversion_table(gd, steps=10)
        >>> options = {"record": "last", "progress": False, "clip_denoised": False}
        >>> noise = gd.p_sample_loop(model, images.shape, sampler=table, noise=images, **options)
        >>> reconstruction = gd.p_sample_loop(model, images.shape, sampler="ddim", steps=10, noise=noise, **options)
    """
    sampling_grid = spaced_grid(process.alphas_cumprod, process.betas, steps, spacing, scale=process.schedule.scale)
    timestep, levels = sampling_grid.timestep.flip(0), sampling_grid.now.flip(0)
    if levels[0] < process.alphas_cumprod[0]:
        timestep = torch.cat([timestep.new_zeros(1), timestep])
        levels = torch.cat([process.alphas_cumprod[:1], levels])
    if len(levels) < 2:
        raise ValueError(f"steps is {steps} with spacing {spacing!r}, which begins at timestep 0, expected a later one")
    inversion_grid = replace(
        sampling_grid, timestep=timestep[:-1], alphas_cumprod=levels, betas=1 - levels[:-1] / levels[1:]
    )
    return process.for_model(ddim_inverse(inversion_grid, prediction=process.prediction))
