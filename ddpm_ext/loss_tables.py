"""Rows of a training loss: what a model is trained towards, and how much that counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpm_ext.tables import DeviceTables
from ddpm_ext.weightings import names, weights

if TYPE_CHECKING:
    from ddpm_ext.diffusion import GaussianDiffusion

__all__ = ["LossTables"]

KEPT = 8


def _target(diffusion: GaussianDiffusion) -> Tensor:
    """(timesteps, 2): k0, k1; the target is k0 x_start + k1 noise."""
    zeros, ones = torch.zeros_like(diffusion.betas), torch.ones_like(diffusion.betas)
    signal, noise = diffusion.sqrt_alphas_cumprod, diffusion.sqrt_one_minus_alphas_cumprod
    of_x0, of_x = diffusion.posterior_mean_coef1, diffusion.posterior_mean_coef2
    columns = {
        "eps": (zeros, ones),
        "x0": (ones, zeros),
        "v": (-noise, signal),
        "x_prev": (of_x0 + of_x * signal, of_x * noise),
    }[diffusion.prediction]
    return torch.stack(columns, 1)


def _rows(target: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([target, torch.stack([weight, torch.zeros_like(weight)], 1)], 1)


class LossTables:
    """Of one diffusion: those of every weighting that has a name, and of the last few given weights for as long as
    nobody writes to these. They stay on the devices where they were used."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        self._of = diffusion.alphas_cumprod, diffusion.prediction
        target, self._names = _target(diffusion), names(*self._of)
        self._named = DeviceTables(**{name: _rows(target, weights(*self._of, name)) for name in self._names})
        self._given: list[tuple[Tensor, int, DeviceTables]] = []  # weights, their version, the rows

    def get(self, weighting: str | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(timesteps, 4): k0, k1, the weight and a zero. Raises TypeError and ValueError as weightings.weights."""
        if not isinstance(weighting, Tensor) and weighting in self._names:
            return self._named.get(weighting, device, dtype)
        if torch.compiler.is_compiling():  # in the graph, which can't see whether somebody has written to them
            target = self._named.get("simple", device, dtype)[:, :2]
            return _rows(target, weights(*self._of, weighting).to(device, dtype))
        for given, version, tables in self._given:
            if given is weighting and version == given._version:
                return tables.get("loss", device, dtype)
        target = self._named.get("simple", torch.device("cpu"), torch.float64)[:, :2]
        tables = DeviceTables(loss=_rows(target, weights(*self._of, weighting)))
        if isinstance(weighting, Tensor) and not weighting.is_inference():  # those have no version
            self._given = [*self._given[-KEPT + 1 :], (weighting, weighting._version, tables)]
        return tables.get("loss", device, dtype)
