"""Grids of sigmas, which may lie between the timesteps of a schedule.

sigma = sqrt(1 / alphas_cumprod - 1) is the standard deviation of the noise for a signal of scale 1, as in Karras et al.
2022. Timesteps and sigmas are converted into each other by linear interpolation in log sigma, as in k-diffusion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.tables.beta_quantile import beta_quantile
from ddpm_ext.tables.grid import Grid, checked_levels

__all__ = [
    "ALIGN_YOUR_STEPS",
    "SIGMA_GRIDS",
    "align_your_steps_grid",
    "alphas_cumprod_of",
    "beta_sigmas",
    "beta_sigmas_grid",
    "exponential_sigmas",
    "karras_grid",
    "karras_sigmas",
    "linear_quadratic",
    "linear_quadratic_grid",
    "log_snr_grid",
    "sgm_uniform_grid",
    "sigmas_of",
    "timestep_at",
]

# The published sigmas where 10 steps start, then the sigma where the last one arrives: Sabour et al. 2024, "Align Your
# Steps".
# https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html.
ALIGN_YOUR_STEPS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def sigmas_of(alphas_cumprod: Tensor) -> Tensor:
    """sqrt(1 / alphas_cumprod - 1), of the same shape and dtype.

    Examples:
        >>> sigmas_of(torch.tensor([0.2, 0.8], dtype=torch.float64))
        tensor([2.0000, 0.5000], dtype=torch.float64)
    """
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


def alphas_cumprod_of(sigma: Tensor) -> Tensor:
    """1 / (1 + sigma^2), of the same shape and dtype.

    Examples:
        >>> alphas_cumprod_of(torch.tensor([2.0, 0.5], dtype=torch.float64))
        tensor([0.2000, 0.8000], dtype=torch.float64)
    """
    return 1 / (1 + sigma**2)


def timestep_at(alphas_cumprod: Tensor, sigma: Tensor) -> Tensor:
    """The timesteps of these sigmas, interpolated in log sigma and clamped to the schedule's ends.

    Args:
        alphas_cumprod: of the schedule, float64 (timesteps,), falling.
        sigma: float64 (n,), finite and above 0.

    Returns:
        float64 (n,), in [0, timesteps - 1].

    Examples:
        >>> timestep_at(gd.alphas_cumprod, torch.tensor([1.0], dtype=torch.float64)).round().tolist()
        [258.0]
    """
    if len(alphas_cumprod) == 1:
        return torch.zeros_like(sigma)
    schedule_log_sigma, log_sigma = sigmas_of(alphas_cumprod).log(), sigma.log()
    above = torch.searchsorted(schedule_log_sigma, log_sigma).clamp(1, len(schedule_log_sigma) - 1)
    low, high = schedule_log_sigma[above - 1], schedule_log_sigma[above]
    # If timestep 0 is clean data, its log sigma is infinite and the quotient NaN: timestep 1 is the nearest.
    return (above - 1 + ((log_sigma - low) / (high - low)).nan_to_num(1.0).clamp(0, 1)).double()


# ------------------------------------------------------------------------------------------- between two levels


def _ramp(steps: int) -> Tensor:
    return torch.linspace(0, 1, steps, dtype=torch.float64, device="cpu")


def karras_sigmas(greatest: float, least: float, steps: int, rho: float = 7.0) -> Tensor:
    """Sigmas evenly spaced in sigma^(1/rho), both ends included: Karras et al. 2022, eq. (5). float64 (steps,).

    Examples:
        >>> karras_sigmas(10.0, 0.1, 3)
        tensor([10.0000,  1.4507,  0.1000], dtype=torch.float64)
    """
    if not rho > 0:
        raise ValueError(f"rho is {rho}, expected rho > 0")
    ramp = _ramp(steps)
    return (greatest ** (1 / rho) * (1 - ramp) + least ** (1 / rho) * ramp) ** rho


def exponential_sigmas(greatest: float, least: float, steps: int) -> Tensor:
    """Sigmas evenly spaced in log sigma, both ends included. float64 (steps,).

    Examples:
        >>> exponential_sigmas(10.0, 0.1, 3)
        tensor([10.0000,  1.0000,  0.1000], dtype=torch.float64)
    """
    ramp = _ramp(steps)
    return torch.exp(math.log(greatest) * (1 - ramp) + math.log(least) * ramp)


def beta_sigmas(greatest: float, least: float, steps: int, alpha: float = 0.6, beta: float = 0.6) -> Tensor:
    """Sigmas at evenly spaced quantiles of a beta distribution, both ends included. float64 (steps,).

    Examples:
        >>> beta_sigmas(10.0, 0.1, 3)
        tensor([10.0000,  5.0500,  0.1000], dtype=torch.float64)
    """
    return least + beta_quantile(1 - _ramp(steps), alpha, beta) * (greatest - least)


def linear_quadratic(steps: int, threshold: float = 0.025, linear_steps: int | None = None) -> Tensor:
    """Sigmas that fall first linearly, then along a parabola: Polyak et al. 2024, "Movie Gen", section 3.4.2, as in
    LTX-Video, Mochi and ComfyUI.

    The linear part falls from 1 by `threshold`. The parabola begins with the same slope and would reach 0 after the
    last step.

    Args:
        steps: the number of steps, at least 1.
        threshold: by how much the linear part falls.
        linear_steps: the number of steps in the linear part, 1 to `steps`. None means half of the steps, rounded down,
            but at least 1. If all steps are linear, there is no parabola.

    Returns:
        float64 (steps,).

    Raises:
        TypeError, ValueError: `linear_steps` is not an int, or out of range.

    Examples:
        >>> linear_quadratic(4)
        tensor([1.0000, 0.9875, 0.9750, 0.7250], dtype=torch.float64)
    """
    linear = max(1, steps // 2)
    if linear_steps is not None:
        linear = checks.integer("linear_steps", linear_steps, steps + 1, f"{steps + 1}", start=1)
    slope = threshold / linear
    curve = (1 - slope * steps) / max(1, steps - linear) ** 2
    i = torch.arange(steps, dtype=torch.float64, device="cpu")
    return 1 - slope * i - curve * (i - linear).clamp(min=0) ** 2


# ----------------------------------------------------------------------------------------------------------- grids


def _sigma_grid(alphas_cumprod: Tensor, sigma: Tensor, final: float) -> Grid:
    """The grid of these descending sigmas. Its timesteps are interpolated in log sigma.

    final: alphas_cumprod where the last step arrives.
    """
    levels = checked_levels(alphas_cumprod)
    loop_levels = torch.cat([alphas_cumprod_of(sigma), levels.new_tensor([final])])
    return Grid(timestep_at(levels, sigma), loop_levels, 1 - loop_levels[:-1] / loop_levels[1:], levels)


def _sigma_range(alphas_cumprod: Tensor, steps: int) -> tuple[float, float]:
    """Checks `steps` and the schedule; returns the schedule's greatest and least sigma."""
    levels = checked_levels(alphas_cumprod)
    checks.integer("steps", steps, 2**31, "2^31", start=1)
    if len(levels) < 2 or not (levels[1:] < levels[:-1]).all():
        raise ValueError("alphas_cumprod does not fall from timestep to timestep, expected a falling one")
    if levels[-1] == 0 or levels[0] == 1:
        raise ValueError("alphas_cumprod reaches 0 or 1, where sigma is infinite or 0: expected all in between")
    greatest, least = sigmas_of(levels[[-1, 0]]).tolist()
    return greatest, least


def karras_grid(alphas_cumprod: Tensor, steps: int, *, rho: float = 7.0, final: float = 1.0) -> Grid:
    """Sigmas evenly spaced in sigma^(1/rho), from the schedule's greatest to its least: Karras et al. 2022, eq. (5).

    Args:
        alphas_cumprod: (timesteps,) with two at least, falling, in (0, 1).
        steps: the number of steps, at least 1.
        rho: above 0. The greater it is, the more steps are at low noise.
        final: alphas_cumprod where the last step arrives.

    Returns:
        A Grid with float64 timesteps, which may lie between the timesteps of the schedule.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    Examples:
        >>> grid = karras_grid(gd.alphas_cumprod, 10, rho=5.0)
    """
    return _sigma_grid(alphas_cumprod, karras_sigmas(*_sigma_range(alphas_cumprod, steps), steps, rho), final)


def log_snr_grid(alphas_cumprod: Tensor, steps: int, *, final: float = 1.0) -> Grid:
    """Sigmas evenly spaced in log sigma, which is -1/2 of the log signal-to-noise ratio: Lu et al. 2022, section 3.

    k-diffusion and diffusers call this spacing "exponential". For the arguments, result and errors see karras_grid.

    Examples:
        >>> grid = log_snr_grid(gd.alphas_cumprod, 10)
    """
    return _sigma_grid(alphas_cumprod, exponential_sigmas(*_sigma_range(alphas_cumprod, steps), steps), final)


def beta_sigmas_grid(
    alphas_cumprod: Tensor, steps: int, *, alpha: float = 0.6, beta: float = 0.6, final: float = 1.0
) -> Grid:
    """Sigmas at quantiles of a beta distribution, between the schedule's greatest and its least: diffusers'
    use_beta_sigmas.

    diffusers cites Lee et al. 2024, who take quantiles of the timesteps instead: that is the spacing "beta".

    Args:
        alpha, beta: above 0, at most 10. An alpha below 1 puts more steps at low noise, a beta below 1 at high noise.

    For the other arguments, the result and the errors see karras_grid.

    Examples:
        >>> grid = beta_sigmas_grid(gd.alphas_cumprod, 10)
    """
    return _sigma_grid(alphas_cumprod, beta_sigmas(*_sigma_range(alphas_cumprod, steps), steps, alpha, beta), final)


def sgm_uniform_grid(alphas_cumprod: Tensor, steps: int, *, final: float = 1.0) -> Grid:
    """Timesteps that fall evenly from the last one and would reach 0 after the last step.

    This is the spacing of Stability's generative-models, with ComfyUI's name and interpolation. For the arguments,
    result and errors see karras_grid.

    Examples:
        >>> sgm_uniform_grid(gd.alphas_cumprod, 3).timestep.round().tolist()
        [999.0, 666.0, 333.0]
    """
    _sigma_range(alphas_cumprod, steps)
    log_sigma = sigmas_of(checked_levels(alphas_cumprod)).log()
    timestep = (1 - _ramp(steps + 1)[:-1]) * (len(log_sigma) - 1)
    below = timestep.long().clamp(max=len(log_sigma) - 2)
    return _sigma_grid(
        alphas_cumprod, torch.lerp(log_sigma[below], log_sigma[below + 1], timestep - below).exp(), final
    )


def linear_quadratic_grid(
    alphas_cumprod: Tensor, steps: int, *, threshold: float = 0.025, linear_steps: int | None = None, final: float = 1.0
) -> Grid:
    """ComfyUI's sigmas: the curve of linear_quadratic, times the schedule's greatest sigma.

    Args:
        threshold, linear_steps: see linear_quadratic.

    For the other arguments, the result and the errors see karras_grid.

    Examples:
        >>> grid = linear_quadratic_grid(gd.alphas_cumprod, 10)
    """
    greatest, _ = _sigma_range(alphas_cumprod, steps)
    return _sigma_grid(alphas_cumprod, greatest * linear_quadratic(steps, threshold, linear_steps), final)


def align_your_steps_grid(alphas_cumprod: Tensor, steps: int, *, model: str = "sd15", final: float = 1.0) -> Grid:
    """Sigmas that were optimised for a model: Sabour et al. 2024.

    The published sigmas are for 10 steps. For another number of steps they are interpolated in log sigma at evenly
    spaced positions, as the authors advise.

    Args:
        model: "sd15" (Stable Diffusion 1.5), "sdxl" (Stable Diffusion XL) or "svd" (Stable Video Diffusion).

    For the other arguments and the result see karras_grid.

    Raises:
        TypeError, ValueError: the errors of karras_grid; an unknown model, or a model whose sigmas begin above the
            schedule's greatest sigma.

    Examples:
        >>> grid = align_your_steps_grid(gd.alphas_cumprod, 10, model="sdxl")
    """
    greatest, _ = _sigma_range(alphas_cumprod, steps)
    checks.one_of("model", model, ALIGN_YOUR_STEPS)
    sigmas = torch.tensor(ALIGN_YOUR_STEPS[model], dtype=torch.float64, device="cpu")
    if sigmas[0] > 1.001 * greatest:  # the published sigmas are rounded
        raise ValueError(
            f"alphas_cumprod reaches a sigma of {greatest:.4g}, expected {sigmas[0]:g} at least, where model {model!r} "
            "begins"
        )
    position = _ramp(steps + 1)[:-1] * (len(sigmas) - 1)
    below = position.long()
    return _sigma_grid(
        alphas_cumprod, torch.lerp(sigmas[below].log(), sigmas[below + 1].log(), position - below).exp(), final
    )


# The keys are the names that `spacing=` takes, in addition to the names of spaced_timesteps.
SIGMA_GRIDS: dict[str, Callable[[Tensor, int], Grid]] = {
    "karras": karras_grid,
    "log_snr": log_snr_grid,
    "exponential": log_snr_grid,
    "beta_sigmas": beta_sigmas_grid,
    "sgm_uniform": sgm_uniform_grid,
    "linear_quadratic": linear_quadratic_grid,
    "align_your_steps": align_your_steps_grid,
    "align_your_steps_sdxl": partial(align_your_steps_grid, model="sdxl"),
    "align_your_steps_svd": partial(align_your_steps_grid, model="svd"),
}
