"""DPM-Solver++: second order with the predicted clean sample of the step before."""

from __future__ import annotations

import torch

from ddpm_ext.tables.samplers import coefficients
from ddpm_ext.tables.samplers.eta import check_eta
from ddpm_ext.tables.samplers.multistep import FEW
from ddpm_ext.tables.spacing import Grid
from ddpm_ext.tables.step_table import StepTable

__all__ = ["dpmpp_2m", "dpmpp_2m_sde"]


def _dpm_solver(grid: Grid, prediction: str, eta: float, lower_order_final: bool) -> StepTable:
    """DPM-Solver++(2M) for the probability flow (eta 0), for the SDE (eta 1), or in between."""
    now, after = grid.now, grid.after
    h = coefficients.half_log_snr(grid).diff()
    extra = eta * h if eta else torch.zeros_like(h)  # 0 even where h is infinite
    towards_x0 = -after.sqrt() * torch.expm1(-h - extra)
    # x0 is extrapolated to the middle of the step by this multiple of its change over the step before.
    onward = torch.zeros_like(h)
    onward[1:] = h[1:] / (2 * h[:-1])
    onward[~onward.isfinite()] = 0
    if lower_order_final and len(grid) < FEW:
        onward[-1] = 0
    a, b = coefficients.x0(grid, prediction)
    return StepTable(
        timestep=grid.timestep,
        a=a,
        b=b,
        c0=towards_x0 * (1 + onward),
        c1=((1 - after) / (1 - now)).sqrt() * torch.exp(-extra),
        s=(1 - after).sqrt() * (-torch.expm1(-2 * extra)).sqrt(),
        c3=-towards_x0 * onward,
        g0=coefficients.score(grid),
        now=now,
        after=after,
    )


def dpmpp_2m(grid: Grid, *, prediction: str = "eps", lower_order_final: bool = True) -> StepTable:
    """DPM-Solver++(2M): Lu et al. 2022b ("DPM-Solver++"), algorithm 2.

    The first step is of first order, since there is no step before it. So is a last step that arrives at clean data
    and, as in diffusers, the last of fewer than 15 steps.

    Args:
        grid: descending.
        prediction: as for ddpm.
        lower_order_final: whether the last of fewer than 15 steps is of first order.

    Raises:
        ValueError: an unknown `prediction`.
    """
    return _dpm_solver(grid, prediction, 0.0, lower_order_final)


def dpmpp_2m_sde(grid: Grid, *, prediction: str = "eps", eta: float = 1.0, lower_order_final: bool = True) -> StepTable:
    """SDE-DPM-Solver++(2M): Lu et al. 2022b, in diffusers' "midpoint" form, with k-diffusion's eta.

    The first and the last step are as in dpmpp_2m.

    Args:
        grid: descending.
        prediction: as for ddpm.
        eta: 1 for the SDE, 0 for dpmpp_2m; finite, >= 0.
        lower_order_final: as for dpmpp_2m.

    Raises:
        TypeError: `eta` is not a number.
        ValueError: `eta` is negative or not finite, or an unknown `prediction`.
    """
    return _dpm_solver(grid, prediction, check_eta(eta), lower_order_final)
