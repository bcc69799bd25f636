"""The solvers of closed_forms.py that read several steps: DPM-Solver++, and those by Adams and Bashforth."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.integrations.diffusers.closed_factors import (
    WIDE,
    Factors,
    Uncovered,
    Untraceable,
    edm_of,
    levels_of,
    predicted_of,
    scales_of,
    to_clean,
)
from ddpm_ext.tables.trace_batch import Array


class _Dpm(NamedTuple):
    """The levels of a DPM-Solver++, Lu et al. 2022.

    Attributes:
        alphas, noises, logs: (steps + 1,), of signal, noise, and their logarithm's difference.
        clean: (steps, 2), the factors of sample and output in the clean sample.
        scales: as Factors has them.
    """

    alphas: Tensor
    noises: Tensor
    logs: Tensor
    clean: Array
    scales: Array | None = None

    @classmethod
    def of(cls, own: Any, first: int) -> _Dpm:
        config = own.config
        if config.algorithm_type != "dpmsolver++" or config.thresholding:
            raise Uncovered
        sigmas = torch.from_numpy(levels_of(own.sigmas)[first:])
        sigma = sigmas[:-1].numpy().astype(WIDE)
        if hasattr(own, "precondition_outputs"):  # of the EDM kind
            clean, scales = edm_of(own, sigmas[:-1].numpy())
            return cls(torch.ones_like(sigmas), sigmas, -torch.log(sigmas), clean, scales_of(scales))
        alphas, noises = own._sigma_to_alpha_sigma_t(sigmas)  # noqa: SLF001 (of diffusers)
        alpha, noise = (x[:-1].numpy().astype(WIDE) for x in (alphas, noises))
        one = np.ones(len(sigma))
        a, b = {
            "epsilon": lambda: (1 / alpha, -noise / alpha),
            "v_prediction": lambda: (alpha, -noise),
            "sample": lambda: (0 * one, one),
            "flow_prediction": lambda: (one, -sigma),
        }[config.prediction_type]()
        return cls(alphas, noises, torch.log(alphas) - torch.log(noises), np.stack([a, b], 1))

    def step(self, solver_type: str, length: int, before: Tensor) -> tuple[Array, ...]:
        """Of steps over `length` of the grid's: the factors of the sample, of the clean sample, and of its slope, and
        what a difference of clean samples is multiplied by to be that, (steps, 1) each. The first ones are missing.

        before: the steps of logs between two clean samples.
        """
        h = self.logs[length:] - self.logs[:-length]
        alphas, shrunk = self.alphas[length:], torch.exp(-h) - 1.0
        of_clean = -(alphas * shrunk)
        of_slope = 0.5 * of_clean if solver_type == "midpoint" else alphas * (shrunk / h + 1.0)
        per_length = torch.zeros_like(h)
        per_length[len(h) - len(before) :] = 1.0 / (before / h[len(h) - len(before) :])
        found = (self.noises[length:] / self.noises[:-length], of_clean, of_slope, per_length)
        return tuple(x.numpy().astype(WIDE)[:, None] for x in found)


@np.errstate(all="ignore")
def dpm_solver_multistep(own: Any, first: int) -> Factors:
    """sigma' / sigma x - alpha' (e^-h - 1) (x0 + h / (2 h before) (x0 - x0 before)), by "midpoint": DPM-Solver++(2M)"""
    config, levels = own.config, _Dpm.of(own, first)
    if own.lower_order_nums or config.solver_order > 2:
        raise Uncovered
    clean, n = levels.clean, len(levels.clean)
    kept, of_clean, slope, length = levels.step(config.solver_type, 1, (levels.logs[1:] - levels.logs[:-1])[:-1])
    is_short = config.lower_order_final and len(own.timesteps) < 15
    ends_by_first_order = config.euler_at_final or is_short or getattr(config, "final_sigmas_type", None) == "zero"
    reads = [config.solver_order == 2 and 0 < i < n - ends_by_first_order for i in range(n)]
    slope, length = (np.where(np.array(reads)[:, None], x, 0) for x in (slope, length))
    factors = of_clean * clean
    factors[:, :1] += kept
    factors += slope * (length * clean)
    past = np.zeros((n, 1, 2))
    past[1:, 0] = -slope[1:] * (length[1:] * clean[:-1])
    x, m = factors.T
    return Factors(x, m, np.zeros(n), None, [False] * n, levels.scales, past=past)


@np.errstate(all="ignore")
def dpm_solver_singlestep(own: Any, first: int) -> Factors:
    """Steps as those of order 1, and from the sample before such a one over both: DPM-Solver++(2S)"""
    levels = _Dpm.of(own, first)
    if any(x is not None for x in own.model_outputs):
        raise Uncovered
    clean, n, solver = levels.clean, len(levels.clean), own.config.solver_type
    orders = np.minimum(own.order_list[first:], 1 + np.arange(n))
    # A clean sample that is the output itself is kept already. Else the rows below keep one tensor and need no second
    # copy of a result, which those that read a sample in their own do.
    if own.config.solver_order == 3 or own.config.prediction_type == "sample":
        return _singlestep_of_clean(levels, solver, orders)
    is_second = orders == 2
    steps = levels.logs[1:] - levels.logs[:-1]
    kept, of_clean, _, _ = levels.step(solver, 1, steps[:0])
    factors, past = of_clean * clean, np.zeros((n, 1, 2))
    factors[:, :1] += kept
    if is_second.any():
        kept, of_clean, slope, length = levels.step(solver, 2, steps[:-1])
        over_both = of_clean * clean[:-1]
        over_both[:, :1] += kept
        over_both -= slope * (length * clean[:-1])
        past[1:, 0] = np.where(is_second[1:, None], over_both, 0)
        factors[1:] = np.where(is_second[1:, None], slope * (length * clean[1:]), factors[1:])
    x, m = factors.T
    return Factors(x, m, np.zeros(n), None, [False] * n, past=past)


def _singlestep_of_clean(levels: _Dpm, solver_type: str, orders: Array) -> Factors:
    """The same with a step over three as well, DPM-Solver++(3S), by rows that keep the clean samples.

    One tensor is too few for what steps over two and over three take of the sample that they begin at and its output.
    They read it in their own sample, which is the result of the step before.
    """
    n, clean, logs = len(orders), levels.clean, levels.logs
    # By order, the factors of the sample that a step begins at, and of the last clean samples, its own first.
    kept, weights = np.zeros((4, n)), np.zeros((4, n, 3))
    for order in range(1, 1 + min(n, 3)):
        since = logs[order - 1 : -1] - logs[:-order]
        found = levels.step(solver_type if order == 2 else "heun", order, since)
        begun, of_clean, slope, per_length = (x[:, 0] for x in found)
        kept[order, order - 1 :], w = begun, weights[order, order - 1 :]
        w[:, order - 1] = of_clean
        if order == 3 and solver_type == "heun":  # by a parabola through the three clean samples
            h = logs[3:] - logs[:-3]
            curve = levels.alphas[3:] * ((torch.exp(-h) - 1.0 + h) / h**2 - 0.5)
            ratio_own, ratio = since / h, (logs[1:-2] - logs[:-3]) / h
            parts = (ratio_own, ratio, 1.0 / ratio, ratio_own - ratio, 2.0 * curve)
            r0, r1, per_r1, apart, twice = (x.numpy().astype(WIDE) for x in parts)
            w[:, 1] = per_r1 * (slope * r0 + twice) / apart
            w[:, 0] = -per_length * (slope * r1 + twice) / apart
        elif order > 1:
            w[:, 0] = slope * per_length
        w[:, order - 1] -= w[:, : order - 1].sum(1)  # which are of differences to the first clean sample
    steps = np.arange(n)
    x, w = kept[orders, steps], weights[orders, steps]
    goes_on = orders > 1
    own = np.where(goes_on, x / kept[orders - 1, steps - 1], 0)
    w[:, 1:] -= own[:, None] * weights[orders - 1, steps - 1, :2]
    factors, past = w[:, :1] * clean, np.zeros((n, 2, 2))
    factors[:, 0] += np.where(goes_on, own, x)
    for k in (1, 2):
        past[k:, k - 1] = w[k:, k, None] * clean[:-k]
    x, m = factors.T
    return Factors(x, m, np.zeros(n), None, [False] * n, past=past, own=own.tolist())


@np.errstate(all="ignore")
def cogvideox_dpm(own: Any, first: int) -> Factors:
    """DPM-Solver++(2M) with noise, Lu et al. 2022, of a clean sample before that steps are given"""
    t, alphas = own.timesteps[first - 1 :], own.alphas_cumprod
    following = t[1:] - own.config.num_train_timesteps // own.num_inference_steps
    alpha, after = alphas[t[1:]], torch.where(following >= 0, alphas[following], own.final_alpha_cumprod)
    before, now, then = (((x / (1 - x)) ** 0.5).log() for x in (alphas[t[:-1]], alpha, after))
    h = then - now
    share = 1 / (2 * ((now - before) / h))
    factors = (
        ((1 - after) / (1 - alpha)) ** 0.5 * (-h).exp(),
        (1 - after) ** 0.5 * (1 - (-2 * h).exp()) ** 0.5,
        -((-2 * h).expm1() * after**0.5),
        1 + share,
        share,
    )
    x, s, over, of_clean, of_given = (values.numpy().astype(WIDE) for values in factors)
    reads = (following >= 0).numpy()
    of_clean, of_given = np.where(reads, of_clean, 1) * over, np.where(reads, -of_given, 0) * over
    clean, _ = predicted_of(own, alpha.numpy())
    return to_clean(x, s, of_clean, clean, (1 + reads).tolist())._replace(given=of_given)


# What a step takes of its own output and those before it, by Adams and Bashforth: by the number of outputs, the factors
# of each, what that is divided by, and multiplied by.
ADAMS = np.array([[1, 0, 0, 0], [3, -1, 0, 0], [23, -16, 5, 0], [55, -59, 37, -9]], WIDE)
DIVISORS, SCALES = np.array([1, 2, 12, 1], WIDE), np.array([1, 1, 1, 1 / 24])


def _adams(stored: Array, orders: Array) -> Array:
    """The parts of sample and output of each step in that, (steps, 4, 2). stored: (steps, 4, 2), of each of these
    tensors. orders: (steps,), how many it takes beside its own."""
    parts = ADAMS[orders][:, :, None] * stored
    made: Array = parts / DIVISORS[orders, None, None] * SCALES[orders, None, None]
    return made


@np.errstate(all="ignore")
def pndm(own: Any, first: int) -> Factors:
    """The plms steps of Liu et al. 2022, whose first one is taken again with the mean of two outputs"""
    config, t = own.config, own.timesteps.numpy()
    if not config.skip_prk_steps and not own.counter and len(t) - first > len(own.prk_timesteps) + 1:
        raise Untraceable("the steps after its Runge-Kutta steps read more of these than the 3 tensors that rows keep")
    length = config.num_train_timesteps // own.num_inference_steps
    is_begun = first or own.counter or own.ets or not config.skip_prk_steps
    if is_begun or len(t) < 4:
        raise Uncovered
    begins = t.copy()
    begins[1] += length
    ends, alphas = begins - length, torch.from_numpy(levels_of(own.alphas_cumprod))
    alpha = alphas[begins]
    after = torch.where(torch.from_numpy(ends >= 0), alphas[ends], own.final_alpha_cumprod)
    per_change = alpha * (1 - after) ** 0.5 + (alpha * (1 - alpha) * after) ** 0.5
    kept, signal, noise, change, per_output = (
        values.numpy().astype(WIDE)[:, None]
        for values in ((after / alpha) ** 0.5, alpha**0.5, (1 - alpha) ** 0.5, after - alpha, per_change)
    )
    orders = np.minimum(np.arange(len(t)) - 1, 3)
    orders[:2] = 0
    mean = _adams(np.broadcast_to([0.0, 1.0], (len(t), 4, 2)), orders)[..., 1]
    mean[1, :2] = 0.5
    of_sample, mean = {
        "epsilon": lambda: (0 * noise, mean),
        "v_prediction": lambda: (noise, signal * mean),
    }[config.prediction_type]()
    x, factors = (kept - change * of_sample / per_output)[:, 0], -(change * mean) / per_output
    # The second step reads the first one's sample, from which that one's result differs by a factor and an output.
    x[1] /= x[0]
    factors[1, 1] -= x[1] * factors[0, 0]
    past = np.stack([np.zeros((len(t), 3)), factors[:, 1:]], 2)
    none = [0.0] * len(t)
    own_part = [0.0, float(x[1]), *none[2:]]
    return Factors(x, factors[:, 0], np.array(none), None, [False] * len(t), past=past, skips=1, own=own_part)


@np.errstate(all="ignore")
def ipndm(own: Any, first: int) -> Factors:
    """Steps to a mean of the last four of beta x + alpha m"""
    if own.ets:
        raise Uncovered
    levels = (torch.from_numpy(levels_of(values)[first:]) for values in (own.alphas, own.betas))
    (alpha, after), (beta, beta_after) = ([x[:-1].numpy().astype(WIDE), x[1:].numpy().astype(WIDE)] for x in levels)
    n = len(alpha)
    stored, sample = np.zeros((2, n, 4, 2))
    for k in range(min(4, n)):
        stored[k:, k] = np.stack([beta, alpha], 1)[: n - k]
    sample[:, 0, 0] = 1
    mean = _adams(stored, np.minimum(np.arange(n), 3))
    alpha, after, beta, beta_after = (x[:, None, None] for x in (np.maximum(alpha, 1e-8), after, beta, beta_after))
    factors = after * ((sample - beta * mean) / alpha) + mean * beta_after
    x, m = factors[:, 0].T
    return Factors(x, m, np.zeros(n), None, [False] * n, past=factors[:, 1:])
