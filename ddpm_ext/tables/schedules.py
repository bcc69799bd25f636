"""Noise schedules: betas of q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I), in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_ext.base import checks

__all__ = ["SCHEDULES", "cosine_betas", "make_betas", "rescale_zero_terminal_snr", "scaled_linear"]


def linear(timesteps: int) -> Tensor:
    """From 1e-4 to 0.02 (Ho et al. 2020, section 4), scaled so that fewer steps end with as much noise."""
    scale = 1000 / timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64, device="cpu")


def scaled_linear(timesteps: int, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Linear in sqrt(beta) from `start` to `end` (Rombach et al. 2022: Stable Diffusion)."""
    return torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64, device="cpu") ** 2


def cosine(timesteps: int, s: float = 0.008) -> Tensor:
    """alphas_cumprod = cos^2((t/T + s) / (1 + s) pi/2), betas at most 0.999 (Nichol & Dhariwal 2021, eq. 17)."""
    return cosine_betas(torch.linspace(0, 1, timesteps + 1, dtype=torch.float64, device="cpu"), s)


def cosine_betas(t: Tensor, s: float = 0.008) -> Tensor:
    """The betas of `cosine` between given times `t`, (timesteps + 1,) from 0 to 1."""
    return _from_alphas_cumprod(torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2)


def sigmoid(timesteps: int, start: float = -3, end: float = 3, tau: float = 1) -> Tensor:
    """alphas_cumprod falls along a sigmoid from `start` to `end`, betas at most 0.999 (Jabri et al. 2022, appendix)."""
    t = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64, device="cpu")
    first, last = (torch.tensor(v / tau, dtype=torch.float64, device="cpu").sigmoid() for v in (start, end))
    return _from_alphas_cumprod((last - ((t * (end - start) + start) / tau).sigmoid()) / (last - first))


def _from_alphas_cumprod(alphas_cumprod: Tensor) -> Tensor:
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)


SCHEDULES = {"linear": linear, "scaled_linear": scaled_linear, "cosine": cosine, "sigmoid": sigmoid}


def make_betas(beta_schedule: str | Tensor, timesteps: int) -> Tensor:
    """The betas of a named schedule, or given betas, checked.

    Args:
        beta_schedule: "linear", "scaled_linear", "cosine", "sigmoid", or betas of shape (timesteps,).
        timesteps: how many, at least 1.

    Returns:
        float64 (timesteps,) on the CPU, in (0, 1); the last may be 1.

    Raises:
        TypeError: `beta_schedule` is neither a name nor a tensor, or `timesteps` is not an int.
        ValueError: an unknown name, or betas of another length, not finite or out of range.
    """
    timesteps = checks.integer("timesteps", timesteps, 2**31, "2^31", start=1)
    if isinstance(beta_schedule, str):
        if beta_schedule not in SCHEDULES:
            names = ", ".join(repr(name) for name in SCHEDULES)
            raise ValueError(f"beta_schedule is {beta_schedule!r}, expected {names} or a tensor of betas")
        betas = SCHEDULES[beta_schedule](timesteps)
        if betas.max() > 1:
            raise ValueError(
                f"timesteps is {timesteps}, too few for beta_schedule {beta_schedule!r}, whose betas would reach "
                f"{betas.max():.3g}: expected at least 20 timesteps, or another schedule"
            )
        return betas
    if not isinstance(beta_schedule, Tensor):
        raise TypeError(f"beta_schedule is a {type(beta_schedule).__name__}, expected a name or a tensor of betas")
    if not beta_schedule.is_floating_point():
        raise TypeError(f"betas have dtype {beta_schedule.dtype}, expected a floating one")
    betas = beta_schedule.detach().to("cpu", torch.float64, copy=True)
    if betas.shape != (timesteps,):
        raise ValueError(f"betas have shape {tuple(betas.shape)}, expected ({timesteps},), one a timestep")
    bad = ~((betas > 0) & (betas < 1))
    bad[-1] &= betas[-1] != 1
    if bad.any():
        i = int(bad.nonzero()[0])
        raise ValueError(f"betas[{i}] is {betas[i].item()}, expected 0 < beta < 1 (the last may be 1)")
    if 1 - betas[0] == 1:
        raise ValueError(f"betas[0] is {betas[0].item()}, expected at least 2^-52: 1 - alphas_cumprod would be 0")
    return betas


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas after which nothing of the signal is left: Lin et al. 2023, algorithm 1.

    sqrt(alphas_cumprod) is shifted and scaled so that it ends at 0 and begins as before.

    Args:
        betas: floating, (timesteps,) with at least two, in (0, 1); the last may be 1.

    Returns:
        float64 (timesteps,) on the CPU, the last exactly 1. A model should predict v or x0 then, since at the last
        timestep eps does not determine x0.

    Raises:
        TypeError, ValueError: as make_betas, or a single beta.
    """
    checks.tensor("betas", betas)
    if betas.dim() != 1 or len(betas) < 2:
        raise ValueError(f"betas have shape {tuple(betas.shape)}, expected (timesteps,) with two at least")
    root = (1 - make_betas(betas, len(betas))).cumprod(0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alphas_cumprod = root**2
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
