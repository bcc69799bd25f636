"""ddpm, ancestral sampling: each step draws from the posterior."""

from __future__ import annotations

from ddpm_ext.base import checks
from ddpm_ext.tables.grid import Grid, Jumps
from ddpm_ext.tables.samplers import coefficients
from ddpm_ext.tables.samplers.any_scale import at_any_scale
from ddpm_ext.tables.step_table import StepTable
from ddpm_ext.tables.variances import VARIANCES, Posterior

__all__ = ["ddpm"]


@at_any_scale
def ddpm(grid: Grid | Jumps, *, prediction: str = "eps", variance: str = "fixed_small") -> StepTable:
    """Ancestral sampling, a draw from the posterior q(x_s | x_t, x_0): Ho et al. 2020, eq. (6), (7) and algorithm 2.

    On a subset of the timesteps, beta = 1 - a_t / a_s: Nichol & Dhariwal 2021, section 4.

    Args:
        grid: descending. The last row of a Grid adds no noise. With Jumps, every row does.
        prediction: what the model predicts, a name of PREDICTIONS such as "eps", "x0", "v", "flow", "edm" or "x_prev".
        variance: the variance of the noise.
            "fixed_small" is the posterior's variance, at least 1e-20.
            "fixed_large" is beta.
            With "learned", the model returns the log-variance in addition to m.
            With "learned_range", the model returns the position of the log-variance between those of "fixed_small" (-1)
            and "fixed_large" (1) (Nichol & Dhariwal 2021, eq. 15, as guided-diffusion scales it).
            With "learned_variance", the model returns the variance itself, as with diffusers' "learned".

    A classifier's gradient moves the mean by the variance times the gradient, also in the last step. As in
    guided-diffusion, this variance has no lower limit for "fixed_small": it is 0 in a step that arrives at clean data.
    For "fixed_large", the gradient's weight in the last step is the posterior variance of the previous step. With
    "learned_range", a last step that arrives at clean data takes the posterior variance of the previous step as its
    lower end. If there is no previous step, both are beta. With Jumps, no step counts as the last.

    Raises:
        ValueError: an unknown `prediction` or `variance`, or a grid that goes up to more noise.

    Examples:
        >>> table = ddpm(grid, variance="fixed_large")  # for sampler= of a loop
    """
    entry = VARIANCES[checks.one_of("variance", variance, VARIANCES)]
    has_end = isinstance(grid, Grid)
    x0_factor, x_factor, _ = coefficients.posterior(grid)
    s, l0, l1, weight = entry.columns(Posterior(coefficients.posterior_variance(grid), grid.betas, has_end))
    if has_end:
        s[-1] = 0
    return coefficients.rows(grid, prediction, c0=x0_factor, c1=x_factor, s=s, l0=l0, l1=l1, g0=None, g1=weight)
