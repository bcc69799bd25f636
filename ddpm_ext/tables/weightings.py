"""Weightings, which say how much each timestep counts in a training loss.

Each weighting is a function of the signal-to-noise ratio alphas_cumprod / (1 - alphas_cumprod) that returns the weight
of the squared error of x_0. `weights` converts it into the weight of the squared error of the model's prediction. For
example, the squared error of eps is the squared error of x_0 times the ratio.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.tables.predictions import PREDICTIONS

__all__ = [
    "WEIGHTINGS",
    "check_given",
    "cosmap",
    "edm",
    "flow_sigma",
    "min_snr",
    "names",
    "p2",
    "sigma_sqrt",
    "snr",
    "truncated_snr",
    "weights",
]


def snr(ratio: Tensor) -> Tensor:
    """The ratio itself, so that the error of eps has weight 1 everywhere: L_simple of Ho et al. 2020.

    Examples:
        >>> snr(torch.tensor([0.25, 4.0, 16.0]))
        tensor([ 0.2500,  4.0000, 16.0000])
    """
    return ratio


def min_snr(ratio: Tensor, gamma: float = 5.0) -> Tensor:
    """The ratio, but at most gamma: Hang et al. 2023, section 3.4.

    Examples:
        >>> min_snr(torch.tensor([0.25, 4.0, 16.0]), gamma=5.0)
        tensor([0.2500, 4.0000, 5.0000])
    """
    return ratio.clamp(max=gamma)


def truncated_snr(ratio: Tensor) -> Tensor:
    """The ratio, but at least 1: Salimans & Ho 2022, section 4.

    Examples:
        >>> truncated_snr(torch.tensor([0.25, 4.0, 16.0]))
        tensor([ 1.,  4., 16.])
    """
    return ratio.clamp(min=1)


def p2(ratio: Tensor, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """ratio / (k + ratio)^gamma, which is reduced where little noise is left: Choi et al. 2022, eq. (8).

    Examples:
        >>> p2(torch.tensor([0.25, 4.0, 16.0]), k=1.0, gamma=1.0)
        tensor([0.2000, 0.8000, 0.9412])
    """
    return ratio / (k + ratio) ** gamma


def edm(ratio: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Karras et al. 2022, table 1: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, with sigma^2 = 1 / ratio.

    Examples:
        >>> edm(torch.tensor([0.25, 4.0, 16.0]), sigma_data=0.5)
        tensor([ 4.2500,  8.0000, 20.0000])
    """
    return 1 / sigma_data**2 + ratio


def flow_sigma(ratio: Tensor) -> Tensor:
    """sigma of a flow's sample (1 - sigma) x_0 + sigma noise with this signal-to-noise ratio."""
    return 1 / (1 + ratio.sqrt())


def sigma_sqrt(ratio: Tensor) -> Tensor:
    """sigma^-2 for the error of a flow's velocity, as in diffusers' training scripts for Stable Diffusion 3.

    The error of the velocity is the error of x_0 divided by sigma, so the squared error of x_0 has weight sigma^-4.

    Examples:
        >>> sigma_sqrt(torch.tensor([0.25, 4.0, 16.0], dtype=torch.float64))
        tensor([  5.0625,  81.0000, 625.0000], dtype=torch.float64)
    """
    return flow_sigma(ratio) ** -4


def cosmap(ratio: Tensor) -> Tensor:
    """2 / (pi (1 - 2 sigma + 2 sigma^2)) for the error of a flow's velocity: Esser et al. 2024, section 3.1.

    It weighs each log SNR as the cosine schedule does.

    Examples:
        >>> cosmap(torch.tensor([0.25, 4.0, 16.0]))
        tensor([ 2.5783, 10.3132, 23.4051])
    """
    sigma = flow_sigma(ratio)
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)) / sigma**2


WEIGHTINGS = {function.__name__: function for function in (snr, min_snr, truncated_snr, p2, edm, sigma_sqrt, cosmap)}


def names(alphas_cumprod: Tensor, prediction: str) -> tuple[str, ...]:
    """The names of the weightings that a prediction can have.

    For "x_prev" this is only "simple", since its squared error is not that of x_0 times a function of the ratio. The
    same holds if the schedule ends at an alphas_cumprod of 0 and the prediction does not determine x_0 there, as eps
    does not.
    """
    entry = PREDICTIONS[prediction]
    has_ratio = entry.error is not None and (entry.without_signal or bool(alphas_cumprod[-1] > 0))
    return ("simple", *WEIGHTINGS) if has_ratio else ("simple",)


def check_given(alphas_cumprod: Tensor, weighting: Tensor) -> None:
    """Checks the caller's weights without reading their values. Raises ValueError."""
    if weighting.shape != alphas_cumprod.shape:
        raise ValueError(f"weighting has shape {tuple(weighting.shape)}, expected {tuple(alphas_cumprod.shape)}")
    if weighting.requires_grad and torch.is_grad_enabled():
        raise ValueError("weighting requires a gradient, expected none")


def weights(alphas_cumprod: Tensor, prediction: str, weighting: str | Tensor) -> Tensor:
    """The weight of the squared error of a prediction at each timestep, float64 (timesteps,).

    Args:
        alphas_cumprod: (timesteps,).
        prediction: a name of PREDICTIONS.
        weighting: "simple", which is 1 everywhere, a name of WEIGHTINGS, or the weights, (timesteps,) and finite.

    Raises:
        TypeError: `weighting` is neither a name nor a tensor.
        ValueError: an unknown name, a name that the prediction cannot have, or weights that have a wrong shape, are not
            finite (not checked under torch.compile) or require a gradient.

    Examples:
        >>> weights(gd.alphas_cumprod, "v", "min_snr").shape
        torch.Size([1000])
    """
    if isinstance(weighting, Tensor):
        check_given(alphas_cumprod, weighting)
        if torch.compiler.is_compiling():  # The weights stay on their device, since a graph must not wait for the host.
            return weighting.detach().double()
        values = weighting.detach().to("cpu", torch.float64)
        if not values.isfinite().all():
            raise ValueError("weighting holds numbers that are not finite, expected finite ones")
        return values
    if not isinstance(weighting, str):
        raise TypeError(f"weighting is a {type(weighting).__name__}, expected a name or a tensor")
    checks.one_of("weighting", weighting, ("simple", *WEIGHTINGS))
    if weighting == "simple":
        return torch.ones_like(alphas_cumprod)
    error = PREDICTIONS[prediction].error
    if error is None:
        raise ValueError(f"weighting is {weighting!r} with prediction {prediction!r}, expected 'simple' or a tensor")
    if weighting not in names(alphas_cumprod, prediction):
        raise ValueError(
            f"weighting is {weighting!r}, but alphas_cumprod ends at 0, where eps does not determine x_0, expected "
            "'simple' or a tensor"
        )
    ratio = alphas_cumprod / (1 - alphas_cumprod)
    return WEIGHTINGS[weighting](ratio) / error(ratio)
