"""Rows of a training loss: what a model is trained towards, and how much that counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.base.checks import is_plain
from ddpm_ext.tables.on_device import DeviceTables
from ddpm_ext.tables.predictions import prediction_coefficients
from ddpm_ext.tables.weightings import check_given, names, weights

if TYPE_CHECKING:
    from ddpm_ext.process.process import ForwardProcess

__all__ = ["ERROR", "Counts", "LossTables"]

KEPT = 8


class Counts(NamedTuple):
    """What counts beside a weighting: whether the model's error does, and by how much a timestep's term of the
    variational bound, in nats (None: it doesn't)."""

    error: bool = True
    bound: float | None = None


ERROR = Counts()


def _target(diffusion: ForwardProcess) -> Tensor:
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


def _bound(diffusion: ForwardProcess, log_variance: Tensor) -> Tensor:
    """(timesteps, 4): l0, l1, the scale of the error, and whether the row is the decoder's. See csrc/core/loss.h.

    The means of posterior and model differ as much as the x_0 do that they are made of, times posterior_mean_coef1;
    and these as the model's output does from its target. `log_variance`: (timesteps, 2), l0 and l1 of l0 + l1 v.
    """
    of_mean = torch.ones_like(diffusion.betas)
    if diffusion.prediction != "x_prev":
        of_mean = (
            diffusion.posterior_mean_coef1 * prediction_coefficients(diffusion.alphas_cumprod, diffusion.prediction)[1]
        )
    l0, l1 = log_variance.unbind(1)
    posterior = diffusion.posterior_log_variance_clipped
    decoder = torch.arange(diffusion.timesteps, device="cpu") == 0
    return torch.stack(
        [
            torch.where(decoder, l0, l0 - posterior),
            l1,
            torch.where(decoder, of_mean, of_mean**2 * (-posterior).exp()),
            decoder.double(),
        ],
        1,
    )


def _rows(target: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([target, torch.stack([weight, torch.zeros_like(weight)], 1)], 1)


def _with_bound(rows: Tensor, bound: Tensor, counts: Counts) -> Tensor:
    """(timesteps, 8)"""
    weight = rows[:, 2:3] if counts.error else torch.zeros_like(rows[:, 2:3])
    # a product, of which torch.compile makes one graph for all numbers
    return torch.cat([rows[:, :2], weight, torch.ones_like(weight) * (counts.bound or 0.0), bound], 1)


class _Weights(NamedTuple):
    """A weighting, and the version that weights had when they were read."""

    weighting: str | Tensor
    version: int = 0

    @staticmethod
    def of(weighting: str | Tensor) -> _Weights:
        return _Weights(weighting, 0 if isinstance(weighting, str) else weighting._version)

    def still(self, weighting: str | Tensor) -> bool:
        if isinstance(weighting, str) or isinstance(self.weighting, str):
            return type(weighting) is type(self.weighting) and weighting == self.weighting
        return weighting is self.weighting and not weighting.is_inference() and weighting._version == self.version


class LossTables:
    """Of one diffusion: those of every weighting that has a name, and of the last few given weights for as long as
    nobody writes to these. They stay on the devices where they were used.

    `log_variance`: (timesteps, 2), l0 and l1 of the model's log-variance l0 + l1 v.
    """

    def __init__(self, diffusion: ForwardProcess, log_variance: Tensor) -> None:
        self._of = diffusion.alphas_cumprod, diffusion.prediction
        target, self._names = _target(diffusion), names(*self._of)
        self.bounded = diffusion.prediction != "eps" or bool(diffusion.alphas_cumprod[-1] > 0)
        """Whether the variational bound is finite: an eps says nothing of x_0 at an alphas_cumprod of 0."""
        named = {name: _rows(target, weights(*self._of, name)) for name in self._names}
        self._named = DeviceTables(
            **named,
            bound=_bound(diffusion, log_variance),
            noise=diffusion.sqrt_one_minus_alphas_cumprod,
        )
        self._kept: list[tuple[_Weights, Counts, DeviceTables]] = []
        self._perturbed: dict[float, DeviceTables] = {}

    def __getstate__(self) -> dict[str, object]:
        """Without given weights, which may be on a device that another process hasn't, or of a graph."""
        return {**self.__dict__, "_kept": []}

    def get(self, weighting: str | Tensor, device: torch.device, dtype: torch.dtype, counts: Counts = ERROR) -> Tensor:
        """(timesteps, 4): k0, k1, the weight and a zero; or (timesteps, 8), with the bound's term.

        Raises TypeError and ValueError as weightings.weights.
        """
        if isinstance(weighting, Tensor):
            check_given(self._of[0], weighting)
        named = isinstance(weighting, str) and weighting in self._names
        if (named and counts.bound is None) or torch.compiler.is_compiling():
            # a graph can't see whether somebody has written to weights
            return self._make(weighting, device, dtype, counts)
        for kept, counted, tables in self._kept:
            if counted == counts and kept.still(weighting):
                return tables.get("loss", device, dtype)
        rows = self._make(weighting, torch.device("cpu"), torch.float64, counts)
        tables = DeviceTables(loss=rows)
        # inference tensors count no versions; what a function transform or a fake mode made is of no use after it
        if is_plain(rows) and (isinstance(weighting, str) or not weighting.is_inference()):
            self._kept = [*self._kept[-KEPT + 1 :], (_Weights.of(weighting), counts, tables)]
        return tables.get("loss", device, dtype)

    def _make(self, weighting: str | Tensor, device: torch.device, dtype: torch.dtype, counts: Counts) -> Tensor:
        if isinstance(weighting, str) and weighting in self._names:
            rows = self._named.get(weighting, device, dtype)
        else:
            target = self._named.get("simple", device, dtype)[:, :2]
            rows = _rows(target, weights(*self._of, weighting).to(device, dtype))
        return rows if counts.bound is None else _with_bound(rows, self._named.get("bound", device, dtype), counts)

    def perturbation(self, scale: float, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(timesteps, 2): 1, and `scale` times the standard deviation of x_t's noise."""
        if torch.compiler.is_compiling():
            noise = self._named.get("noise", device, dtype)
            return torch.stack([torch.ones_like(noise), noise * scale], 1)
        tables = self._perturbed.get(scale)
        if tables is None:
            noise = self._named.get("noise", torch.device("cpu"), torch.float64)
            rows = torch.stack([torch.ones_like(noise), noise * scale], 1)
            tables = DeviceTables(noise=rows)
            if is_plain(rows):
                self._perturbed = {scale: tables}
        return tables.get("noise", device, dtype)
