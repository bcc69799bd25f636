"""A sampling loop with every option, in float64 and plain torch, written from the papers' formulas.

The tests compare with its results. It runs on the CPU, and uses only the reference's noise from ddpm_ext.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ddpm_ext import Philox, reference

TIMESTEPS = (99, 80, 61, 40, 22, 9, 3, 0)


class Row(NamedTuple):
    """A step: its timestep, the draw of its noise, and alphas_cumprod before (`now`) and after it."""

    timestep: int
    draw: int
    now: float
    after: float


def rows_of(levels, timesteps=TIMESTEPS):
    after = [*(float(levels[t]) for t in timesteps[1:]), 1.0]
    return [Row(t, t, float(levels[t]), above) for t, above in zip(timesteps, after, strict=True)]


def noise(shape, ids, draw, stream=0, seed=1):
    rng = Philox(seed, torch.as_tensor(ids))
    return reference.randn(shape, rng, draw=draw, stream=stream, dtype=torch.float64)


def each(values, x):
    """(batch,) -> (batch, 1, ...)"""
    return values.reshape(-1, *[1] * (x.dim() - 1))


def threshold(x0, quantile, maximum):
    """Saharia et al. 2022, section 2.3."""
    bound = torch.quantile(x0.flatten(1).abs(), quantile, dim=1).clamp(1, maximum)
    bound = each(bound, x0)
    return torch.minimum(torch.maximum(x0, -bound), bound) / bound


class Posterior:
    """q(x_s | x_t, x_0), Ho et al. 2020, eq. (7), where alphas_cumprod is `after` at s and `now` at t."""

    def __init__(self, now, after):
        alpha = now / after
        self.beta = 1 - alpha
        self.of_x0 = after**0.5 * self.beta / (1 - now)
        self.of_x = alpha**0.5 * (1 - after) / (1 - now)
        self.variance = (1 - after) / (1 - now) * self.beta


def predicted(prediction, levels, row, x, m):
    """x0 and eps computed from the model's output."""
    root, coroot = row.now**0.5, (1 - row.now) ** 0.5
    if prediction == "eps":
        return (x - coroot * m) / root, m
    if prediction == "v":
        return root * x - coroot * m, coroot * x + root * m
    if prediction == "x_prev":  # the mean of a single step of the schedule
        single_step = Posterior(row.now, float(levels[row.timestep - 1]) if row.timestep else 1.0)
        m = (m - single_step.of_x * x) / single_step.of_x0
    return m, (x - root * m) / coroot


def learned_variance(name, posterior, smallest, v):
    """The variance that the model predicts, None if it is fixed. `smallest` is the lower end of a learned range."""
    if name == "learned_variance":
        return v
    if name == "learned":
        return v.exp()
    if name == "learned_range":
        share = (v + 1) / 2
        return (share * math.log(posterior.beta) + (1 - share) * math.log(smallest)).exp()
    return None


def plain_loop(
    levels,
    rows,
    x,
    model,
    *,
    ids,
    sampler="ddpm",
    eta=0.0,
    prediction="eps",
    variance="fixed_small",
    clip=(-1.0, 1.0),
    quantile=None,
    maximum=float("inf"),
    scale=1.0,
    unconditional=None,
    rescale=0.0,
    interval=(0, 10**9),
    cond_fn=None,
    denoised_fn=None,
    known=None,
    mask=None,
    self_condition=False,
):
    """x and x0 after each row. "ddim" uses the model's own eps, "rederived" is ddim with the eps of the clipped x0."""
    batch, x0 = len(x), torch.zeros_like(x)
    for i, row in enumerate(rows):
        z = noise(x.shape, ids, row.draw)
        t = torch.full((batch,), row.timestep)
        if row.now > row.after:  # a jump back: the forward process
            alpha = row.after / row.now
            after = alpha**0.5 * x + (1 - alpha) ** 0.5 * z
        else:
            posterior = Posterior(row.now, row.after)
            known_x0 = (x0,) if self_condition else ()
            m, v = model(x, t, *known_x0), None
            if variance.startswith("learned"):
                m, v = m.chunk(2, 1)
            if unconditional is not None and interval[0] <= row.timestep <= interval[1]:
                u = unconditional(x, t, *known_x0)[:, : x.shape[1]]
                guided = (1 - scale) * u + scale * m
                ratio = each(m.flatten(1).std(1) / guided.flatten(1).std(1), x)
                m = rescale * guided * ratio + (1 - rescale) * guided
            x0, eps = predicted(prediction, levels, row, x, m)
            if denoised_fn is not None:
                x0 = denoised_fn(x0)
            if quantile is not None:
                x0 = threshold(x0, quantile, maximum)
            elif clip is not None:
                x0 = x0.clamp(*clip)
            gradient = torch.zeros_like(x) if cond_fn is None else cond_fn(x, t)
            last = i == len(rows) - 1
            if sampler == "ddpm":
                # the last step's posterior has no variance: guided-diffusion uses the previous step's variance
                earlier_variance = (
                    Posterior(rows[i - 1].now, rows[i - 1].after).variance if last else posterior.variance
                )
                spread = learned_variance(variance, posterior, earlier_variance, v)
                if spread is None:
                    spread = posterior.beta if variance == "fixed_large" else posterior.variance
                of_gradient = earlier_variance if last and variance == "fixed_large" else spread
                after = posterior.of_x0 * x0 + posterior.of_x * x + of_gradient * gradient
                after = after + (0.0 if last else spread**0.5 * z)
            else:
                if sampler == "rederived":
                    eps = (x - row.now**0.5 * x0) / (1 - row.now) ** 0.5
                eps = eps - (1 - row.now) ** 0.5 * gradient
                x0 = x0 + (1 - row.now) / row.now**0.5 * gradient
                sigma = eta * posterior.variance**0.5
                after = row.after**0.5 * x0 + (1 - row.after - sigma**2) ** 0.5 * eps + sigma * z
        if known is not None:
            after = mask * (row.after**0.5 * known + (1 - row.after) ** 0.5 * z) + (1 - mask) * after
        x = after
        yield x, x0
