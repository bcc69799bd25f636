"""Noise schedules, in float64.

A schedule is either a list of betas, with q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I), or a list of levels
of signal and noise, with x_t = signal_t x_0 + noise_t eps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.tables import levels

__all__ = [
    "SCHEDULES",
    "ForwardLevels",
    "NoiseSchedule",
    "cosine_betas",
    "edm",
    "flow",
    "forward_levels",
    "make_betas",
    "rescale_zero_terminal_snr",
    "scaled_linear",
    "sigma_space",
]


def linear(timesteps: int) -> Tensor:
    """Linear from 1e-4 to 0.02 (Ho et al. 2020, section 4), scaled so that fewer steps end with as much noise."""
    scale = 1000 / timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64, device="cpu")


def scaled_linear(timesteps: int, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Linear in sqrt(beta) from `start` to `end` (Rombach et al. 2022: Stable Diffusion)."""
    return torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64, device="cpu") ** 2


def cosine(timesteps: int) -> Tensor:
    """alphas_cumprod falls from 1 as cos^2((t/T + 0.008) / 1.008 pi/2) (Nichol & Dhariwal 2021, eq. 17).

    Betas are at most 0.999.
    """
    return cosine_betas(torch.linspace(0, 1, timesteps + 1, dtype=torch.float64, device="cpu"))


def cosine_betas(t: Tensor) -> Tensor:
    """The betas of `cosine` between neighbouring times `t`, (timesteps + 1,) from 0 to 1."""
    return _from_alphas_cumprod(torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2)


def sigmoid(timesteps: int) -> Tensor:
    """alphas_cumprod falls along a sigmoid from -3 to 3, betas at most 0.999 (Jabri et al. 2022, appendix)."""
    t = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64, device="cpu")
    first, last = (torch.tensor(end, dtype=torch.float64, device="cpu").sigmoid() for end in (-3.0, 3.0))
    return _from_alphas_cumprod((last - (6 * t - 3).sigmoid()) / (last - first))


def _from_alphas_cumprod(alphas_cumprod: Tensor) -> Tensor:
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A schedule without betas: the levels of a forward process, x_t = signal[t] x_0 + noise[t] eps.

    Args:
        signal, noise: floating, (timesteps,), finite and at least 0. noise / signal is above 0 and rises. Before the
            first level, the data is clean and has a signal of 1.
        timestep: (timesteps,), the timesteps that the model is called with: as int64 if they are integers, else as
            float32. Or a function of signal and noise, float64 (n,) each, that returns the timesteps of any levels,
            floating (n,). None means 0, 1, ... Without a function, timesteps between the levels are interpolated in
            log(noise / signal).
        scale: the samples' scale at levels between these (ddpm_ext.tables.levels). With None, levels lie on the
            straight line through the two nearest levels.

    The attributes have the names of the arguments: float64 on the CPU, but int64 for timesteps that are integers.

    Attributes:
        timestep_of: the function that was passed as `timestep`, or None.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, numbers out of range, or noise that does not grow relative to the signal.

    Examples:
        >>> from ddpm_ext.tables.schedules import NoiseSchedule
        >>> noise = torch.linspace(0.01, 0.99, 50)
        >>> gd = GaussianDiffusion(50, NoiseSchedule(1 - noise, noise, timestep=1000 * noise), prediction="flow")
    """

    signal: Tensor
    noise: Tensor
    timestep: Tensor | levels.TimestepOf | None = None
    scale: levels.Scale | None = None
    timestep_of: levels.TimestepOf | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        signal, noise = levels.checked_pairs(self.signal, self.noise)
        power = levels.power_share(signal, noise)
        is_out_of_order = power >= torch.cat([power.new_ones(1), power[:-1]])
        if is_out_of_order.any():
            i = int(is_out_of_order.nonzero()[0])
            raise ValueError(f"noise[{i}] is {noise[i]} with signal {signal[i]}, expected more noise than before")
        attributes: dict[str, object] = {"signal": signal, "noise": noise}
        if self.timestep is not None:
            expected = f"that of signal, {tuple(signal.shape)}"
            timestep, timestep_of = levels.checked_timesteps(self.timestep, signal, noise, expected)
            attributes |= {"timestep": timestep, "timestep_of": timestep_of}
        for name, values in attributes.items():
            object.__setattr__(self, name, values)
        if self.scale is None:
            clean = signal.new_ones(1), noise.new_zeros(1)
            nodes = torch.cat([clean[0], signal]), torch.cat([clean[1], noise])
            object.__setattr__(self, "scale", partial(levels.straight, nodes=nodes))


def flow(timesteps: int) -> NoiseSchedule:
    """Rectified flow: noise sigma_t = (t + 1) / timesteps and signal 1 - sigma_t (Liu et al. 2023; Lipman et al. 2023).

    The model is called with 1000 sigma_t. The sigmas are those of diffusers' FlowMatchEulerDiscreteScheduler without a
    shift. Its timesteps are `timesteps` sigma_t, the same only for 1000 timesteps.

    Examples:
        >>> flow(4).noise
        tensor([0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    sigma = torch.arange(1, timesteps + 1, dtype=torch.float64, device="cpu") / timesteps
    return NoiseSchedule(1 - sigma, sigma, levels.flow_timestep, levels.flow)


def sigma_space(sigmas: Tensor, timestep: Tensor | levels.TimestepOf | None = None) -> NoiseSchedule:
    """The schedule of k-diffusion's samples: x_0 plus noise of standard deviation sigma.

    Args:
        sigmas: (timesteps,), rising, above 0.
        timestep: see NoiseSchedule.

    Raises:
        TypeError, ValueError: see NoiseSchedule.

    Examples:
        >>> sigmas = torch.linspace(0.01, 10.0, 18)
        >>> diffusion = GaussianDiffusion(18, sigma_space(sigmas), prediction="x0")
    """
    checks.tensor("sigmas", sigmas)
    return NoiseSchedule(torch.ones_like(sigmas), sigmas, timestep, levels.sigma_space)


def edm(sigmas: Tensor, sigma_data: float = 0.5) -> NoiseSchedule:
    """The schedule of the samples that EDM's network takes: c_in (x_0 + sigma eps).

    c_in = 1 / sqrt(sigma^2 + sigma_data^2), and the network is called with c_noise = ln(sigma) / 4: Karras et al. 2022,
    table 1. Its output is the prediction "edm" for a sigma_data of 0.5: for others see ddpm_ext.tables.predictions.edm.

    Args:
        sigmas: (timesteps,), rising, above 0.
        sigma_data: the data's standard deviation, above 0.

    Raises:
        TypeError, ValueError: the errors of NoiseSchedule, or `sigma_data` is not a number above 0.

    Examples:
        >>> sigmas = torch.linspace(0.01, 10.0, 18)
        >>> diffusion = GaussianDiffusion(18, edm(sigmas), prediction="edm")
    """
    checks.tensor("sigmas", sigmas)
    checks.nonnegative("sigma_data", sigma_data)
    if sigma_data == 0:
        raise ValueError("sigma_data is 0, expected sigma_data > 0")
    sigma = sigmas.detach().to("cpu", torch.float64)
    c_in = 1 / (sigma**2 + sigma_data**2).sqrt()
    return NoiseSchedule(c_in, c_in * sigma, levels.edm_timestep, partial(levels.edm, sigma_data=sigma_data))


SCHEDULES: dict[str, Callable[[int], Tensor | NoiseSchedule]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "flow": flow,
}


class ForwardLevels(NamedTuple):
    """The numbers of any schedule, with or without betas, float64 on the CPU.

    Attributes:
        betas, alphas_cumprod: (timesteps,), of the samples x / r, with r^2 = signal^2 + noise^2.
        signal, noise: (timesteps,).
        scale: the function that returns r at a level. With None, r is 1.
        timestep: (timesteps,), the timesteps that the model is called with. None means 0, 1, ...
        timestep_of: the function that returns the model's timesteps between these levels, or None.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    signal: Tensor
    noise: Tensor
    scale: levels.Scale | None = None
    timestep: Tensor | None = None
    timestep_of: levels.TimestepOf | None = None


def forward_levels(beta_schedule: str | Tensor | NoiseSchedule, timesteps: int) -> ForwardLevels:
    """The levels of a schedule.

    Args:
        beta_schedule: a name of SCHEDULES, betas of shape (timesteps,), or a NoiseSchedule of this length.
        timesteps: the number of timesteps, at least 1.

    Raises:
        TypeError: `beta_schedule` is none of these, betas are not floating, or `timesteps` is not an int.
        ValueError: an unknown name; too few `timesteps` for the named schedule, or below 1; betas or levels of a wrong
            length, not finite or out of range; or betas whose alphas_cumprod is 0 before the last timestep.
    """
    timesteps = checks.integer("timesteps", timesteps, 2**31, "2^31", start=1)
    schedule: object = beta_schedule
    if isinstance(beta_schedule, str):
        if beta_schedule not in SCHEDULES:
            names = ", ".join(repr(name) for name in SCHEDULES)
            raise ValueError(f"beta_schedule is {beta_schedule!r}, expected {names}, betas or a NoiseSchedule")
        schedule = SCHEDULES[beta_schedule](timesteps)
        if isinstance(schedule, Tensor) and schedule.max() > 1:
            raise ValueError(
                f"timesteps is {timesteps}, too few for beta_schedule {beta_schedule!r}, whose betas would reach "
                f"{schedule.max():.3g}: expected at least 20 timesteps, or another schedule"
            )
    if isinstance(schedule, NoiseSchedule):
        signal, noise, timestep = schedule.signal, schedule.noise, schedule.timestep
        if len(signal) != timesteps:
            raise ValueError(f"beta_schedule has {len(signal)} levels, expected {timesteps}, one a timestep")
        assert timestep is None or isinstance(timestep, Tensor)
        betas, share = levels.betas_between((signal, noise)), levels.power_share(signal, noise)
        return ForwardLevels(betas, share, signal, noise, schedule.scale, timestep, schedule.timestep_of)
    if not isinstance(schedule, Tensor):
        kind = type(schedule).__name__
        raise TypeError(f"beta_schedule is a {kind}, expected a name, a tensor of betas or a NoiseSchedule")
    betas = schedule if schedule is not beta_schedule else _checked_betas(schedule, timesteps)
    alphas_cumprod = (1 - betas).cumprod(0)
    zeros = (alphas_cumprod[:-1] == 0).nonzero()
    if len(zeros):
        raise ValueError(
            f"betas: alphas_cumprod[{int(zeros[0])}] is 0 in float64, expected 0 at the last timestep alone"
        )
    return ForwardLevels(betas, alphas_cumprod, alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())


def make_betas(beta_schedule: str | Tensor | NoiseSchedule, timesteps: int) -> Tensor:
    """The betas of forward_levels, (timesteps,) in (0, 1); the last may be 1.

    For the arguments and errors see forward_levels.

    Examples:
        >>> make_betas("cosine", 1000).shape
        torch.Size([1000])
    """
    return forward_levels(beta_schedule, timesteps).betas


def _checked_betas(values: Tensor, timesteps: int) -> Tensor:
    if not values.is_floating_point():
        raise TypeError(f"betas have dtype {values.dtype}, expected a floating one")
    if values.is_meta:
        raise ValueError("betas are on meta, expected a device on which they have values")
    betas = values.detach().to("cpu", torch.float64, copy=True)
    if betas.shape != (timesteps,):
        raise ValueError(f"betas have shape {tuple(betas.shape)}, expected ({timesteps},), one a timestep")
    is_out_of_order = ~((betas > 0) & (betas < 1))
    is_out_of_order[-1] &= betas[-1] != 1
    checks.refuse("betas", betas, is_out_of_order, "0 < beta < 1 (the last may be 1)")
    if 1 - betas[0] == 1:
        raise ValueError(f"betas[0] is {betas[0].item()}, expected at least 2^-52: 1 - alphas_cumprod would be 0")
    return betas


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Changes betas so that no signal is left at the last timestep: Lin et al. 2024, algorithm 1.

    sqrt(alphas_cumprod) is shifted and scaled so that it ends at 0 and its first value stays.

    Args:
        betas: floating, (timesteps,) with at least two, in (0, 1). The last may be 1.

    Returns:
        float64 (timesteps,) on the CPU, the last exactly 1. A model for these betas should predict v or x0, since eps
        does not determine x0 at the last timestep.

    Raises:
        TypeError, ValueError: the errors of make_betas, or a single beta.

    Examples:
        >>> betas = rescale_zero_terminal_snr(gd.betas)
        >>> diffusion = GaussianDiffusion(1000, betas, prediction="v")
    """
    checks.tensor("betas", betas)
    if betas.dim() != 1 or len(betas) < 2:
        raise ValueError(f"betas have shape {tuple(betas.shape)}, expected (timesteps,) with two at least")
    root = (1 - make_betas(betas, len(betas))).cumprod(0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alphas_cumprod = root**2
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
