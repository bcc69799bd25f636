"""flow_sde: a flow as a stochastic differential equation, for reinforcement learning, which needs random steps."""

from __future__ import annotations

import torch

from ddpm_ext.base import checks
from ddpm_ext.tables.grid import Grid, Jumps
from ddpm_ext.tables.levels import unit_levels
from ddpm_ext.tables.samplers.any_scale import at_any_scale
from ddpm_ext.tables.samplers.ddim import implicit
from ddpm_ext.tables.samplers.eta import check_eta
from ddpm_ext.tables.step_table import StepTable

__all__ = ["flow_sde"]

VARIANTS = ("flow_grpo", "dance_grpo")


@at_any_scale
def flow_sde(
    grid: Grid | Jumps,
    *,
    prediction: str = "eps",
    eta: float = 0.7,
    variant: str = "flow_grpo",
    last_noise: bool = False,
) -> StepTable:
    """A step of Euler and Maruyama along an SDE that has the flow's marginals: Liu et al. 2025, "Flow-GRPO".

    With t the flow's sigma where a step starts, t' its sigma where the step arrives, and d the SDE's noise coefficient,

        prev = (1 - t') x_0 + (t' - d^2 (t - t') / (2 t)) eps + d sqrt(t - t') z

    Samples of another scale, such as variance-preserving ones, take the step of the flow with the same ratios of signal
    and noise.

    Args:
        grid: descending.
        prediction: see ddpm.
        eta: the scale of the noise, Flow-GRPO's noise_level, finite, >= 0. 0 gives Euler's method.
        variant: "flow_grpo": d = eta sqrt(t / (1 - t)); if t is 1, the denominator has t' in place of t, as in the
            authors' code. "dance_grpo": d = eta (Xue et al. 2025).
        last_noise: whether the step to clean data adds noise, as it does in both papers' code. Without noise the step
            ends at the predicted x_0 and has no probability.

    Raises:
        TypeError: `eta` is not a number.
        ValueError: `eta` is negative or not finite, an unknown `prediction` or `variant`, or a grid that goes up to
            more noise.

    Examples:
        >>> from ddpm_ext.tables.flow_grids import flow_grid, flow_sigmas
        >>> table = flow_sde(flow_grid(flow_sigmas(10, shift=3.0)), prediction="flow", eta=0.7)
    """
    eta, _ = check_eta(eta), checks.one_of("variant", variant, VARIANTS)
    signal, noise = unit_levels(grid.now)
    signal_after, noise_after = unit_levels(grid.after)
    t, power_after = noise / (signal + noise), signal_after + noise_after
    t_after = noise_after / power_after
    d = torch.full_like(t, eta)
    if variant == "flow_grpo":
        d = d * (t / (1 - torch.where(t == 1, t_after, t))).sqrt()
    if not last_noise:
        d = torch.where(t_after == 0, 0.0, d)
    step_length = t - t_after
    eps_factor = t_after - d**2 * step_length / (2 * t)
    return implicit(
        grid, prediction, d * step_length.sqrt() * power_after, keep_eps=True, direction=eps_factor * power_after
    )
