"""The variances of a reverse step. An entry of VARIANCES defines a variance completely; all other code reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

LEAST = 1e-20  # a variance is clamped to this before its logarithm is taken


class Posterior(NamedTuple):
    """The bounds of a reverse step's variance, for descending rows: (rows,), float64.

    Attributes:
        small: the variance of q(x_s | x_t, x_0), eq. (7) of Ho et al. 2020, with x_s the step's result.
        large: beta, the variance of q(x_t | x_s).
        has_last_step: whether the last row is the last step of a process, which adds no noise.
    """

    small: Tensor
    large: Tensor
    has_last_step: bool

    def small_before_end(self, small: Tensor) -> Tensor:
        """`small` with its last value replaced by the previous row's, or by beta if there is only one row."""
        return torch.cat([small[:-1], small[-2:-1] if len(small) > 1 else self.large])


class NoiseColumns(NamedTuple):
    """Columns of a step table, (rows,): s, l0, l1 for the noise, and g1, the weight of a classifier's gradient."""

    s: Tensor
    l0: Tensor
    l1: Tensor
    g1: Tensor


class FixedVariance(NamedTuple):
    """The variances of a schedule's reverse steps where the model doesn't return them: (timesteps,), float64.

    Attributes:
        variance: the variance itself. At t = 0, the posterior's is 0, and "fixed_large" has the posterior's of t = 1.
        log_variance: its logarithm. The posterior's variance is clamped to LEAST first.
        finite: `variance`, but at t = 0 the posterior's variance of t = 1, or beta if there is only one timestep. This
            makes the log-likelihood finite.
    """

    variance: Tensor
    log_variance: Tensor
    finite: Tensor


def _finite(variance: Tensor, betas: Tensor, posterior_variance: Tensor) -> Tensor:
    return torch.cat([posterior_variance[1:2] if len(betas) > 1 else betas, variance[1:]])


def _schedule_small(betas: Tensor, posterior_variance: Tensor) -> FixedVariance:
    log_variance = posterior_variance.clamp(min=LEAST).log()
    return FixedVariance(posterior_variance, log_variance, _finite(posterior_variance, betas, posterior_variance))


def _schedule_large(betas: Tensor, posterior_variance: Tensor) -> FixedVariance:
    finite = _finite(betas, betas, posterior_variance)
    return FixedVariance(finite, finite.log(), finite)


@dataclass(frozen=True)
class Variance:
    """The variance of p(x_{t-1} | x_t).

    Args:
        meaning: a description, for help texts.
        columns: returns the columns of a step table.
        schedule: returns the variances of the schedule's steps, for a model that doesn't return them, from betas and
            the variance of q(x_{t-1} | x_t, x_0), each (timesteps,).
        learned: whether the model returns the variance, in twice the channels.
        logarithm: for a learned variance, whether the model returns v of the log-variance 2 (l0 + l1 v). Otherwise v is
            the variance itself.
        bound: whether the variational bound can train a model for this variance.
        peers: {another library: its names of the variance}, first the name to write into its config.
    """

    meaning: str
    columns: Callable[[Posterior], NoiseColumns]
    schedule: Callable[[Tensor, Tensor], FixedVariance] = _schedule_small
    learned: bool = False
    logarithm: bool = False
    bound: bool = True
    peers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """The model output's channels divided by the sample's."""
        return 2 if self.learned else 1


def _fixed(variance: Tensor, weight: Tensor) -> NoiseColumns:
    return NoiseColumns(variance.sqrt(), torch.zeros_like(variance), torch.zeros_like(variance), weight)


def _fixed_large(posterior: Posterior) -> NoiseColumns:
    weight = posterior.large
    # As in guided-diffusion, the gradient's weight in the last step is the posterior variance of the previous step.
    if posterior.has_last_step:
        weight = torch.cat(
            [posterior.large[:-1], posterior.small[-2:-1] if len(posterior.large) > 1 else posterior.large]
        )
    return _fixed(posterior.large, weight)


def _learned_columns(l0: Tensor, l1: Tensor) -> NoiseColumns:
    return NoiseColumns(torch.ones_like(l0), l0, l1, torch.ones_like(l0))


def _learned_range(posterior: Posterior) -> NoiseColumns:
    """Eq. (15) of Nichol & Dhariwal 2021, with v from -1 to 1 as guided-diffusion scales it."""
    small, large = posterior.small.clamp(min=LEAST), posterior.large
    # The last step's posterior variance is 0, so its range would begin at LEAST, which means nothing. As in
    # guided-diffusion, it begins at the variance of the step before.
    if posterior.has_last_step and posterior.small[-1] == 0:
        small = posterior.small_before_end(small)
    return _learned_columns((large.log() + small.log()) / 4, (large.log() - small.log()) / 4)


def _same_name(name: str, *diffusers: str) -> dict[str, tuple[str, ...]]:
    return {"diffusers": diffusers, "guided-diffusion": (name.upper(),)}


VARIANCES: dict[str, Variance] = {
    "fixed_small": Variance(
        meaning="the posterior's",
        columns=lambda posterior: _fixed(posterior.small.clamp(min=LEAST), posterior.small),
        peers=_same_name("fixed_small", "fixed_small", "fixed_small_log"),
    ),
    "fixed_large": Variance(
        meaning="beta",
        columns=_fixed_large,
        schedule=_schedule_large,
        peers=_same_name("fixed_large", "fixed_large", "fixed_large_log"),
    ),
    "learned": Variance(
        meaning="the model returns its logarithm",
        columns=lambda posterior: _learned_columns(
            torch.zeros_like(posterior.small), torch.full_like(posterior.small, 0.5)
        ),
        learned=True,
        logarithm=True,
        # diffusers' steps do not know "learned_log", so they do not split the model's output, which raises an error
        # unless samples have one channel. With "learned", they would take the logarithm for the variance.
        peers=_same_name("learned", "learned_log"),
    ),
    "learned_range": Variance(
        meaning="the model returns where its logarithm lies between those of fixed_small (-1) and fixed_large (1)",
        columns=_learned_range,
        learned=True,
        logarithm=True,
        peers=_same_name("learned_range", "learned_range"),
    ),
    "learned_variance": Variance(
        meaning="the model returns it",
        columns=lambda posterior: _learned_columns(
            torch.zeros_like(posterior.small), torch.zeros_like(posterior.small)
        ),
        learned=True,
        bound=False,
        peers={"diffusers": ("learned",)},
    ),
}

TRAINABLE_VARIANCES = tuple(name for name, variance in VARIANCES.items() if variance.bound)


def peer_variances(library: str) -> dict[str, str]:
    """Maps the names of variances in `library` to ddpm_ext's names."""
    return {peer_name: name for name, entry in VARIANCES.items() for peer_name in entry.peers.get(library, ())}
