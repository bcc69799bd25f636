"""CFG++: classifier-free guidance whose steps add noise again along the eps of the unconditional output."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ddpm_ext.tables.grid import Grid, Jumps
from ddpm_ext.tables.levels import level_columns
from ddpm_ext.tables.samplers import coefficients, multistep
from ddpm_ext.tables.samplers.any_scale import at_any_scale
from ddpm_ext.tables.samplers.ddim import ancestral_sigma, implicit
from ddpm_ext.tables.samplers.two_calls import merged
from ddpm_ext.tables.sigma_grids import sigmas_of
from ddpm_ext.tables.step_table import StepTable

__all__ = ["dpmpp_2m_cfg_pp", "euler_ancestral_cfg_pp", "euler_cfg_pp"]


def _renoised(grid: Grid | Jumps, prediction: str, sigma: Tensor) -> StepTable:
    """DDIM's rows with the eps of the unconditional output, which a clip of x0 does not change."""
    table = implicit(grid, prediction, sigma, keep_eps=True)
    return replace(table, c2=None, cu=table.c2, g1=None)


@at_any_scale
def euler_cfg_pp(grid: Grid | Jumps, *, prediction: str = "eps") -> StepTable:
    """CFG++ on DDIM: Chung et al. 2024, algorithm 2; ComfyUI has it by this name.

    The step is prev = sqrt(a_s) x0 + sqrt(1 - a_s) eps_u. Its x0 comes from the guided output u + scale (m - u), and
    eps_u from the unconditional output u. The scale is the paper's lambda, which is in [0, 1]. A scale of 1 is not the
    same as no guidance: without guidance the rows are ddim's. A clip of x0 does not change eps_u.

    For the arguments and errors see ddim.

    Examples:
        >>> table = euler_cfg_pp(grid)  # for a loop with guidance=0.6, say
    """
    return _renoised(grid, prediction, torch.zeros_like(grid.now))


@at_any_scale
def euler_ancestral_cfg_pp(grid: Grid | Jumps, *, prediction: str = "eps", eta: float = 1.0) -> StepTable:
    """CFG++ with fresh noise, ComfyUI's variant: euler_cfg_pp's rows with euler_ancestral's noise.

    For the arguments and errors see euler_ancestral.

    Examples:
        >>> table = euler_ancestral_cfg_pp(grid, eta=0.5)  # for a loop with guidance
    """
    return _renoised(grid, prediction, ancestral_sigma(grid, eta))


@at_any_scale
def dpmpp_2m_cfg_pp(grid: Grid, *, prediction: str = "eps") -> StepTable:
    """CFG++ on DPM-Solver++(2M), with the same samples as the authors' code and ComfyUI.

    With y = x / sqrt(alphas_cumprod) at the step's start and y_s at its end, h the step's length in lambda, r the
    previous step's length divided by h, u0 the x0 of the unconditional output, and u0' the previous step's u0:

        y_s = x0 + e^-h (y - u0) + (1 - e^-h) / (2 r) (x0 - u0')

    A step is two rows, since a row's `kept` cannot contain the unconditional output. The first row arrives at u0, a
    clean sample, and keeps the terms without u0 and u0'. The second row calls no model, and keeps u0 for the next step.
    The first step has no u0', so it leaves out the last term. A last step to clean data is one row, and so is a step
    from pure noise.

    For the arguments and errors see ipndm.

    Examples:
        >>> table = dpmpp_2m_cfg_pp(grid)  # for a loop with guidance
    """
    table, first = euler_cfg_pp(grid, prediction=prediction), multistep.first_step(grid)
    h = coefficients.half_log_snr(grid).diff()
    share = torch.zeros_like(h)
    share[first + 1 :] = -torch.expm1(-h[first + 1 :]) * h[first + 1 :] / (2 * h[first:-1])
    ratio = sigmas_of(grid.after) / sigmas_of(grid.now)
    twice = (grid.now > 0) & (grid.after < 1)
    first_rows = replace(
        table,
        c0=torch.where(twice, 0.0, table.c0),
        c1=torch.where(twice, table.a, table.c1),
        cu=torch.where(twice, table.b, table.cu),
        signal_after=torch.where(twice, 1.0, table.signal_after),
        noise_after=torch.where(twice, 0.0, table.noise_after),
        k0=torch.where(twice, 1 + share, 0.0),
        k1=torch.where(twice, ratio / grid.now.sqrt(), 0.0),
    )
    number, signal, zeros = torch.arange(len(grid), device="cpu"), grid.after[twice].sqrt(), torch.zeros_like(h[twice])
    if not len(signal):
        return first_rows
    c1, h2, levels = -signal * ratio[twice], -signal * share[twice], level_columns(zeros + 1, grid.after[twice])
    second_rows = StepTable(grid.timestep[twice], zeros, zeros, zeros, c1, h1=signal, h2=h2, k1=zeros + 1, **levels)
    return merged([(2 * number, first_rows), (2 * number[twice] + 1, second_rows)])
