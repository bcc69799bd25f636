"""CFG++: classifier-free guidance that renoises with the unconditional output."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ddpm_ext.tables.samplers.ddim import ancestral_sigma, implicit
from ddpm_ext.tables.spacing import Grid, Jumps
from ddpm_ext.tables.step_table import StepTable

__all__ = ["euler_ancestral_cfg_pp", "euler_cfg_pp"]


def _renoised(grid: Grid | Jumps, prediction: str, sigma: Tensor) -> StepTable:
    """DDIM's rows with the model's own eps, which is that of the unconditional output."""
    table = implicit(grid, prediction, sigma, keep_eps=True)
    return replace(table, c2=None, cu=table.c2, g0=None, g1=None)


def euler_cfg_pp(grid: Grid | Jumps, *, prediction: str = "eps") -> StepTable:
    """CFG++ on DDIM: Chung et al. 2024, algorithm 2; ComfyUI has it by this name.

    x0 comes from the guided output u + scale (m - u), and the noise that leads on from the unconditional output u:
    prev = sqrt(a_s) x0 + sqrt(1 - a_s) eps_u. The scale is the paper's lambda, which it has in [0, 1]: a scale of 1 is
    not the same as no guidance. Without guidance the rows are ddim's. Where x0 is clipped, eps_u stays as it was.

    Args, raises: as for ddim.
    """
    return _renoised(grid, prediction, torch.zeros_like(grid.now))


def euler_ancestral_cfg_pp(grid: Grid | Jumps, *, prediction: str = "eps", eta: float = 1.0) -> StepTable:
    """CFG++ with fresh noise, as ComfyUI has it: euler_cfg_pp's rows with euler_ancestral's noise.

    Args, raises: as for ddim.
    """
    return _renoised(grid, prediction, ancestral_sigma(grid, eta))
