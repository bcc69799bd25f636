"""DPM-Solver and DPM-Solver++: multistep samplers that read the predictions of one or two previous steps."""

from __future__ import annotations

import math

import torch

from ddpm_ext.tables.grid import Grid
from ddpm_ext.tables.samplers import coefficients, multistep
from ddpm_ext.tables.samplers.any_scale import at_any_scale
from ddpm_ext.tables.samplers.eta import check_eta
from ddpm_ext.tables.step_table import StepTable

__all__ = ["dpm_solver_2m", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "dpmpp_3m_sde"]


def _dpm_solver(grid: Grid, prediction: str, eta: float, lower_order_final: bool) -> StepTable:
    """DPM-Solver++(2M) for the probability flow (eta 0), for the SDE (eta 1), or for another eta."""
    after, h = grid.after, coefficients.half_log_snr(grid).diff()
    extra = eta * h if eta else torch.zeros_like(h)  # for eta 0 not a product, which would be NaN for an infinite h
    towards_x0 = -after.sqrt() * torch.expm1(-h - extra)
    # x0 is extrapolated to the middle of the step: its change over the previous step is added, times this factor.
    extrapolation = torch.zeros_like(h)
    extrapolation[1:] = h[1:] / (2 * h[:-1])
    extrapolation[~extrapolation.isfinite()] = 0
    if lower_order_final and len(grid) < multistep.FEW:
        extrapolation[-1] = 0
    x_factor, s = multistep.sde_factors(grid, extra)
    weights = torch.stack([towards_x0 * (1 + extrapolation), -towards_x0 * extrapolation], 1)
    return multistep.rows_by_x0(grid, prediction, x_factor, weights.tolist(), s)


@at_any_scale
def dpmpp_2m(grid: Grid, *, prediction: str = "eps", lower_order_final: bool = True) -> StepTable:
    """DPM-Solver++(2M): Lu et al. 2022b ("DPM-Solver++"), algorithm 2.

    The first step is of first order, since it has no previous step. The last step is of first order if it arrives at
    clean data and, as in diffusers, if there are fewer than 15 steps.

    Args:
        grid: descending.
        prediction: see ddpm.
        lower_order_final: whether the last of fewer than 15 steps is of first order.

    Raises:
        ValueError: an unknown `prediction`.

    Examples:
        >>> table = dpmpp_2m(grid)  # for sampler= of a loop
    """
    return _dpm_solver(grid, prediction, 0.0, lower_order_final)


@at_any_scale
def dpmpp_2m_sde(grid: Grid, *, prediction: str = "eps", eta: float = 1.0, lower_order_final: bool = True) -> StepTable:
    """SDE-DPM-Solver++(2M): Lu et al. 2022b, in diffusers' "midpoint" form, with k-diffusion's eta.

    The first and the last step are of the same order as in dpmpp_2m.

    Args:
        grid: descending.
        prediction: see ddpm.
        eta: finite, >= 0. 1 is the SDE, 0 is dpmpp_2m.
        lower_order_final: see dpmpp_2m.

    Raises:
        TypeError: `eta` is not a number.
        ValueError: `eta` is negative or not finite, or an unknown `prediction`.

    Examples:
        >>> table = dpmpp_2m_sde(grid, eta=0.5)  # for sampler= of a loop
    """
    return _dpm_solver(grid, prediction, check_eta(eta), lower_order_final)


def _third_order(grid: Grid, prediction: str, eta: float, lower_order_final: bool) -> StepTable:
    """DPM-Solver++(3M) for the probability flow (eta 0), for the SDE (eta 1), or for another eta."""
    after, steps = grid.after, coefficients.half_log_snr(grid).diff()
    extra = eta * steps if eta else torch.zeros_like(steps)  # for eta 0 not a product, NaN for an infinite step
    h = steps.tolist()
    weights = []
    for i, order in enumerate(multistep.orders(grid, 3, lower_order_final=lower_order_final)):
        length = (1 + eta) * h[i]
        row = [-math.expm1(-length), 0.0, 0.0]
        if order > 1:  # phi_2 and phi_3 weigh x0's first and second derivative by lambda, in units of h
            phi_2 = 1 - row[0] / length
            phi_3 = phi_2 / length - 0.5
            latest, before = h[i - 1] / h[i], h[i - 2] / h[i] if order > 2 else math.inf
            last_two = latest + before
            newer, older = phi_2, 0.0  # the weights of x0's slopes over the previous step and the step before that
            if order > 2:
                older = (phi_3 - phi_2 * latest) / last_two
                newer = phi_2 - older
            row = [row[0] + newer / latest, older / before - newer / latest, -older / before]
        weights.append([after[i].sqrt().item() * weight for weight in row])
    x_factor, s = multistep.sde_factors(grid, extra)
    return multistep.rows_by_x0(grid, prediction, x_factor, weights, s)


@at_any_scale
def dpmpp_3m(grid: Grid, *, prediction: str = "eps", lower_order_final: bool = True) -> StepTable:
    """DPM-Solver++(3M), which also reads the x0 of the two previous steps: k-diffusion's dpmpp_3m_sde without noise.

    The coefficients are those of k-diffusion and diffusers ("heun"), where the second derivative of x0 has half of the
    weight that the exact integral gives it. So the method is of second order, but its error is smaller than dpmpp_2m's.

    The first step is of first order, the second of second order. A last step that arrives at clean data is of first
    order. As in diffusers, of fewer than 15 steps the last is of first order and the last but one of second.

    Args:
        grid: descending.
        prediction: see ddpm.
        lower_order_final: whether the last two of fewer than 15 steps are of lower order. In k-diffusion they are not.

    Raises:
        ValueError: an unknown `prediction`.

    Examples:
        >>> dpmpp_3m(grid).history  # whether rows read tensors that earlier rows kept
        True
    """
    return _third_order(grid, prediction, 0.0, lower_order_final)


@at_any_scale
def dpmpp_3m_sde(grid: Grid, *, prediction: str = "eps", eta: float = 1.0, lower_order_final: bool = True) -> StepTable:
    """SDE-DPM-Solver++(3M): k-diffusion's dpmpp_3m_sde.

    The first and the last steps are of the same order as in dpmpp_3m.

    Args:
        grid: descending.
        prediction: see ddpm.
        eta: finite, >= 0. 1 is the SDE, 0 is dpmpp_3m.
        lower_order_final: see dpmpp_3m.

    Raises:
        TypeError: `eta` is not a number.
        ValueError: `eta` is negative or not finite, or an unknown `prediction`.

    Examples:
        >>> table = dpmpp_3m_sde(grid, eta=0.5)  # for sampler= of a loop
    """
    return _third_order(grid, prediction, check_eta(eta), lower_order_final)


@at_any_scale
def dpm_solver_2m(grid: Grid, *, prediction: str = "eps", lower_order_final: bool = True) -> StepTable:
    """DPM-Solver(2M): dpmpp_2m's rule for eps in place of x0, which diffusers calls "dpmsolver" with midpoints.

    The step is an integral of eps (Lu et al. 2022, proposition 3.1). eps is extrapolated to the middle of the step by
    its change over the previous step. The first and the last step are of the same order as in dpmpp_2m.

    For the arguments and errors see dpmpp_2m.

    Examples:
        >>> table = dpm_solver_2m(grid)  # for sampler= of a loop
    """
    h = coefficients.half_log_snr(grid).diff().tolist()
    order_of_step = multistep.orders(grid, 2, lower_order_final=lower_order_final)
    extrapolation = [h[i] / (2 * h[i - 1]) if order > 1 else 0.0 for i, order in enumerate(order_of_step)]
    return multistep.rows_by_eps(grid, prediction, [(1 + share, -share) for share in extrapolation])
