"""What a model can predict: an entry of PREDICTIONS defines everything about one prediction.

Notation: x is the variance-preserving sample x_t, m the model's output, a_t is alphas_cumprod at t. A sample of another
scale is divided by its scale first (ddpm_ext.tables.levels); m is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_ext.base import checks

# If alphas_cumprod is (nearly) 0 and the model predicts eps, x0 = HUGE (x - m): once clipped, the sign of x - m.
# HUGE is a power of two near 1e30, so that both products are exact and x = m gives exactly 0.
HUGE = 2.0**100


class Levels(NamedTuple):
    """The levels of signal and noise where steps start.

    Attributes:
        alphas_cumprod: (rows,).
        of_x0, of_x: (rows,), the weights of x_0 and x_t in the mean of q(x_s | x_t, x_0), eq. (7) of Ho et al. 2020,
            with x_s the sample where the step arrives.
    """

    alphas_cumprod: Tensor
    of_x0: Tensor
    of_x: Tensor

    @property
    def signal(self) -> Tensor:
        return self.alphas_cumprod.sqrt()

    @property
    def noise(self) -> Tensor:
        return (1 - self.alphas_cumprod).sqrt()


Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Prediction:
    """What a model's output m is.

    Args:
        meaning: a description of m, for help texts.
        x0: a, b of x0 = a x + b m, the predicted clean sample.
        eps: p, q of eps = p x + q m, the noise that the prediction implies.
        target: k0, k1 of k0 x_start + k1 noise, which the model is trained to return.
        error: the factor from the squared error of x0 to the squared error of m, as a function of the signal-to-noise
            ratio a_t / (1 - a_t). None if the factor depends on more than this ratio: "simple" is then the only named
            weighting.
        without_signal: whether m determines x0 where alphas_cumprod is 0.
        any_step: whether the prediction also works in loops of fewer steps, where rows follow from their levels alone.
            "x_prev", the mean of q(x_{t-1} | x_t, x_0), does not, because it belongs to the steps of the schedule.
        peers: {another library: its name of the prediction}.
    """

    meaning: str
    x0: Callable[[Levels], Pair]
    eps: Callable[[Levels], Pair]
    target: Callable[[Levels], Pair]
    error: Callable[[Tensor], Tensor] | None
    without_signal: bool = True
    any_step: bool = True
    peers: Mapping[str, str] = field(default_factory=dict)

    def mean_slope(self, levels: Levels) -> Tensor:
        """The weight of m in the mean of p(x_{t-1} | x_t), (rows,)."""
        return levels.of_x0 * self.x0(levels)[1] if self.any_step else torch.ones_like(levels.of_x0)


def _x0_of_eps(levels: Levels) -> Pair:
    """Eq. (15) of Ho et al. 2020."""
    a = levels.alphas_cumprod.rsqrt()
    no_signal = a > HUGE
    b = -(1 / levels.alphas_cumprod - 1).sqrt()
    return torch.where(no_signal, HUGE, a), torch.where(no_signal, -HUGE, b)


def _x0_of_x_prev(levels: Levels) -> Pair:
    """Eq. (7) of Ho et al. 2020, solved for x_0."""
    return -levels.of_x / levels.of_x0, 1 / levels.of_x0


def _eps_of(x0: Callable[[Levels], Pair]) -> Callable[[Levels], Pair]:
    """eps = (x - sqrt(a_t) x0) / sqrt(1 - a_t): eq. (4) of Ho et al. 2020, solved for the noise."""

    def eps(levels: Levels) -> Pair:
        a, b = x0(levels)
        return (1 - levels.signal * a) / levels.noise, -levels.signal * b / levels.noise

    return eps


def _x0_itself(levels: Levels) -> Pair:
    return torch.zeros_like(levels.alphas_cumprod), torch.ones_like(levels.alphas_cumprod)


def edm(sigma_data: float = 0.5) -> Prediction:
    """What EDM's network F predicts: x0 = c_skip x + c_out F, for x with a signal of 1 (Karras et al. 2022, table 1).

    Args:
        sigma_data: the data's standard deviation, above 0. PREDICTIONS["edm"] has the paper's 0.5. To use another, add
            an entry such as PREDICTIONS["my_edm"] = edm(0.25).

    Raises:
        TypeError, ValueError: `sigma_data` is not a number, or not above 0.
    """
    checks.nonnegative("sigma_data", sigma_data)
    if sigma_data == 0:
        raise ValueError("sigma_data is 0, expected sigma_data > 0")

    def x0(levels: Levels) -> Pair:
        power = levels.noise**2 + (sigma_data * levels.signal) ** 2
        return sigma_data**2 * levels.signal / power, sigma_data * levels.noise / power.sqrt()

    def target(levels: Levels) -> Pair:
        root = (levels.noise**2 + (sigma_data * levels.signal) ** 2).sqrt()
        return levels.noise / (sigma_data * root), -sigma_data * levels.signal / root

    return Prediction(
        meaning=f"F of EDM, with x0 = c_skip x + c_out F and sigma_data {sigma_data:g} (Karras et al. 2022, table 1)",
        x0=x0,
        eps=_eps_of(x0),
        target=target,
        error=lambda ratio: ratio + 1 / sigma_data**2,
    )


PREDICTIONS: dict[str, Prediction] = {
    "eps": Prediction(
        meaning="the noise",
        x0=_x0_of_eps,
        eps=lambda levels: (torch.zeros_like(levels.alphas_cumprod), torch.ones_like(levels.alphas_cumprod)),
        target=lambda levels: (torch.zeros_like(levels.alphas_cumprod), torch.ones_like(levels.alphas_cumprod)),
        error=lambda ratio: ratio,
        without_signal=False,
        peers={"diffusers": "epsilon", "guided-diffusion": "EPSILON", "denoising-diffusion-pytorch": "pred_noise"},
    ),
    "x0": Prediction(
        meaning="the clean sample",
        x0=_x0_itself,
        eps=_eps_of(_x0_itself),
        target=lambda levels: (torch.ones_like(levels.alphas_cumprod), torch.zeros_like(levels.alphas_cumprod)),
        error=torch.ones_like,
        peers={"diffusers": "sample", "guided-diffusion": "START_X", "denoising-diffusion-pytorch": "pred_x0"},
    ),
    "v": Prediction(
        meaning="the velocity sqrt(alphas_cumprod) eps - sqrt(1 - alphas_cumprod) x0 (Salimans & Ho 2022, section 4)",
        x0=lambda levels: (levels.signal, -levels.noise),
        eps=lambda levels: (levels.noise, levels.signal),
        target=lambda levels: (-levels.noise, levels.signal),
        error=lambda ratio: ratio + 1,
        peers={"diffusers": "v_prediction", "denoising-diffusion-pytorch": "pred_v"},
    ),
    # diffusers' "flow_prediction" is x0 = x - sigma m at all levels. It equals this entry only at the levels of a flow.
    "flow": Prediction(
        meaning="the velocity of rectified flow, eps - x0 (Liu et al. 2023)",
        x0=lambda levels: (1 / (levels.signal + levels.noise), -levels.noise / (levels.signal + levels.noise)),
        eps=lambda levels: (1 / (levels.signal + levels.noise), levels.signal / (levels.signal + levels.noise)),
        target=lambda levels: (-torch.ones_like(levels.alphas_cumprod), torch.ones_like(levels.alphas_cumprod)),
        error=lambda ratio: (1 + ratio.sqrt()) ** 2,
    ),
    "edm": edm(),
    "x_prev": Prediction(
        meaning="the mean of q(x_{t-1} | x_t, x_0)",
        x0=_x0_of_x_prev,
        eps=_eps_of(_x0_of_x_prev),
        target=lambda levels: (levels.of_x0 + levels.of_x * levels.signal, levels.of_x * levels.noise),
        error=None,
        any_step=False,
        peers={"guided-diffusion": "PREVIOUS_X"},
    ),
}

# The predictions that work with every sampler and every spacing.
SPACED_PREDICTIONS = tuple(name for name, prediction in PREDICTIONS.items() if prediction.any_step)


def peer_predictions(library: str) -> dict[str, str]:
    """Maps the names of predictions in `library` to ddpm_ext's names."""
    return {entry.peers[library]: name for name, entry in PREDICTIONS.items() if library in entry.peers}
