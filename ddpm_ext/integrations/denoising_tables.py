"""denoising-diffusion-pytorch's buffers as rows for the operators."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.integrations.fallback import Fallback
from ddpm_ext.integrations.tutorial_trial import posterior_steps
from ddpm_ext.tables import samplers
from ddpm_ext.tables.grid import Jumps
from ddpm_ext.tables.on_device import StepDeviceTables
from ddpm_ext.tables.predictions import peer_predictions
from ddpm_ext.tables.step_table import StepTable

__all__ = ["BUFFERS", "DTYPES", "LOW", "DdimSteps", "DenoisingTables"]

BUFFERS = (
    "alphas_cumprod",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "loss_weight",
)
LOW = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *LOW)
PREDICTIONS = peer_predictions("denoising-diffusion-pytorch")
CACHED = 8  # settings of ddim_sample


class DdimSteps(NamedTuple):
    """ddim_sample's steps, in its order.

    pairs: the timesteps where each starts and arrives. tables: their rows. weights: for each, the weights of x_start,
    of pred_noise and of the noise in the next sample.
    """

    pairs: list[tuple[int, int]]
    tables: StepDeviceTables
    weights: list[tuple[float, float, float]]


class DenoisingTables:
    """The rows that an objective and the buffers make.

    A number that a buffer holds is read from it, not derived again: near t = 0, 1 - alphas_cumprod loses digits in
    float32.

    Raises Fallback for an unknown objective, or numbers that are not finite.
    """

    def __init__(self, buffers: tuple[Tensor, ...], objective: str) -> None:
        self.device = buffers[0].device
        self.dtype = functools.reduce(torch.promote_types, (buffer.dtype for buffer in buffers))
        # The dtypes that samples have after a step, too.
        self.sample_dtypes = {dtype for dtype in DTYPES if torch.promote_types(dtype, self.dtype) == dtype}
        own = {name: x.detach().to("cpu", torch.float64) for name, x in zip(BUFFERS, buffers, strict=True)}
        signal, noise = own["sqrt_alphas_cumprod"], own["sqrt_one_minus_alphas_cumprod"]
        zeros, ones = torch.zeros_like(signal), torch.ones_like(signal)
        prediction = PREDICTIONS.get(objective)
        if prediction is None:
            raise Fallback(f"its objective is {objective!r}")
        # x_0 = a x + b m, and the weights of x_0 and of the noise in what the model is trained to return.
        (a, b), target = {
            "eps": ((own["sqrt_recip_alphas_cumprod"], -own["sqrt_recipm1_alphas_cumprod"]), (zeros, ones)),
            "x0": ((zeros, ones), (ones, zeros)),
            "v": ((signal, -noise), (-noise, signal)),
        }[prediction]
        try:
            steps = posterior_steps(own, a, b)
        except ValueError as error:
            raise Fallback(f"its buffers make no rows: {error}") from None
        self.steps = StepDeviceTables(
            steps,
            q_sample=torch.stack([signal, noise], 1),
            start=torch.stack([a, b], 1),
            loss=torch.stack([*target, own["loss_weight"], zeros], 1),
        )
        self._own, self._a, self._b = own, a, b
        self._ddim: BoundedCache[DdimSteps] = BoundedCache(CACHED)

    def ddim(self, timesteps: int, count: int, eta: float) -> DdimSteps:
        """ddim_sample's steps. Raises Fallback where they have no fused form."""
        try:
            key = (timesteps, count, samplers.check_eta(eta))
            return self._ddim.get_or_make(key, lambda: self._make_ddim(*key))
        except (TypeError, ValueError) as error:
            raise Fallback(str(error)) from None

    def _make_ddim(self, timesteps: int, count: int, eta: float) -> DdimSteps:
        """The rows of samplers.ddim, whose noise is derived by sqrt_recipm1_alphas_cumprod; the last ends at x_0.

        Raises ValueError where there are none.
        """
        if not 0 < timesteps <= len(self.steps) or count < 1:
            raise ValueError(f"num_timesteps is {timesteps} and sampling_timesteps {count}")
        times = (
            torch.linspace(-1, timesteps - 1, steps=count + 1, device="cpu").int().tolist()[::-1]
        )  # in float32, as the peer's
        t = torch.tensor(times[:-1], device="cpu")
        a, b = self._a[t], self._b[t]
        c0, c1, s = torch.ones_like(a), torch.zeros_like(a), torch.zeros_like(a)
        weights = torch.stack([c0, c1, s], 1)
        if count > 1:
            levels = self._own["alphas_cumprod"][t]
            now, after = levels[:-1], levels[1:]
            made = samplers.ddim(Jumps(t[:-1], now, after, now / after), eta=eta, keep_eps=False)
            if (1 - after - made.s**2 < 0).any():
                raise ValueError(f"ddim_sampling_eta is {eta}, whose noise is more than a step ends with")
            direction = made.c1 * (1 - now).sqrt()  # what pred_noise is multiplied by
            recip, recipm1 = (self._own[f"sqrt_{name}_alphas_cumprod"][t[:-1]] for name in ("recip", "recipm1"))
            c0[:-1], c1[:-1], s[:-1] = after.sqrt() - direction / recipm1, direction * recip / recipm1, made.s
            weights[:-1] = torch.stack([after.sqrt(), direction, made.s], 1)
        rows = StepDeviceTables(StepTable(t, a, b, c0, c1, s=s))
        return DdimSteps(list(itertools.pairwise(times)), rows, [tuple(row) for row in weights.tolist()])
