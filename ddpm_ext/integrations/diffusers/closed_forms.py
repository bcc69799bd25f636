"""Schedulers of diffusers whose steps are written here as expressions of their own levels; see closed_rows.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.tables.trace_batch import Array

WIDE = np.float64


class Uncovered(Exception):
    """An expression is not what a scheduler's steps do."""


class Factors(NamedTuple):
    """Of steps prev = x * sample + m * output + s * noise, float64 (steps,) each.

    Attributes:
        clean: (steps, 2), a and b of the second tensor, a sample + b output, that a step returns; None without one.
        noisy: (steps,), whether a step draws noise.
        scales: what each step's sample is multiplied by for the model, 1 for the first; None where it is not.
        past: (steps, tensors, 2), the factors of the sample and the output of each of the last steps that stored a
            tensor, the last one first, which a step adds as well; None where the scheduler stores no tensor.
        skips: a step that stores none, though others do; None without one.
        own: (steps,), as TraceResult has it; None for zeros.
        period: with 2, every second step stores a tensor, which the one after it reads and drops.
        dt: (steps,), the length that every `period`th step stores; None where none does.
    """

    x: Array
    m: Array
    s: Array
    clean: Array | None
    noisy: list[bool]
    scales: Array | None = None
    past: Array | None = None
    skips: int | None = None
    own: list[float] | None = None
    period: int = 1
    dt: Tensor | None = None


# Levels and products of levels are float32, as diffusers computes them, and what a step makes of a sample float64. So
# the rows have the bits of traced ones.


def _levels(x: Tensor) -> Array:
    if x.dtype is not torch.float32:
        raise Uncovered
    found: Array = x.numpy()
    return found


def _root(x: Array) -> Array:
    """By torch, as diffusers' own: numpy's last bit may be another."""
    return torch.from_numpy(x).sqrt().numpy()


@np.errstate(all="ignore")
def _euler(own: Any, first: int, is_ancestral: bool = False) -> Factors:
    """x + (x - x0) / sigma * (sigma' - sigma); ancestral, to sigma_down in place of sigma', and noise up to sigma'"""
    sigmas = _levels(own.sigmas)[first:]
    sigma, to = sigmas[:-1], sigmas[1:]
    n, up = len(to), np.zeros(len(to))
    if is_ancestral:
        up = _root(to**2 * (sigma**2 - to**2) / sigma**2)
        to = _root(to**2 - up**2)
    clean, root = _clean(own, sigma)
    x, m = (_slope(clean, sigma) * (to - sigma).astype(WIDE)[:, None]).T
    return Factors(1 + x, m, up.astype(WIDE), clean, [is_ancestral] * n, _scales(1 / root.astype(WIDE)))


def _clean(own: Any, sigma: Array) -> tuple[Array, Array]:
    """The factors of sample and output in the clean sample, (steps, 2), and what a sample is divided by for the
    model."""
    one, root = np.ones(len(sigma)), _root(sigma**2 + 1)
    a, b = {
        "epsilon": lambda: (one, -sigma),
        "v_prediction": lambda: (1 / (sigma**2 + 1).astype(WIDE), -sigma / root),
        "sample": lambda: (0 * one, one),
    }[getattr(own.config, "prediction_type", "epsilon")]()
    return np.stack([a, b], 1), root


def _slope(clean: Array, sigma: Array) -> Array:
    """The factors of sample and output in (x - x0) / sigma, (steps, 2)"""
    return np.stack([1 - clean[:, 0], -clean[:, 1]], 1) / sigma[:, None].astype(WIDE)


def _scales(scales: Array) -> Array | None:
    """As Factors has them, of what each step's is. That of a single step is unknown."""
    return np.append(1.0, scales[1:].astype(WIDE)) if len(scales) > 1 else None


def _edm(own: Any, sigma: Array) -> tuple[Array, Array]:
    """The factors of sample and output in the clean sample, (steps, 2), and what a sample is multiplied by: Karras et
    al. 2022"""
    data = own.config.sigma_data
    variance = sigma**2 + data**2
    root = _root(variance)
    signs = {"epsilon": 1, "v_prediction": -1}
    c_out = signs[own.config.prediction_type] * sigma * data / root
    return np.stack([data**2 / variance, c_out], 1).astype(WIDE), 1 / root


@np.errstate(all="ignore")
def _edm_euler(own: Any, first: int) -> Factors:
    sigmas = _levels(own.sigmas)[first:]
    sigma, dt = sigmas[:-1], (sigmas[1:] - sigmas[:-1]).astype(WIDE)
    clean, scales = _edm(own, sigma)
    x, m = (_slope(clean, sigma) * dt[:, None]).T
    return Factors(1 + x, m, np.zeros(len(x)), clean, [False] * len(x), _scales(scales))


@np.errstate(all="ignore")
def _heun(own: Any, first: int) -> Factors:
    """An Euler step, and from its beginning one by the mean of two slopes"""
    if own.dt is not None or getattr(own.config, "clip_sample", False):
        raise Uncovered
    sigmas = _levels(own.sigmas)[first:]
    dt = sigmas[1:] - sigmas[:-1]
    dt[1::2] = dt[:-1:2]
    return _in_two(own, sigmas[:-1], dt, 2, is_given=hasattr(own, "scale_model_input"))


@np.errstate(all="ignore")
def _kdpm2(own: Any, first: int, is_ancestral: bool = False) -> Factors:
    """An Euler step to the level between, and from its beginning one by the slope there"""
    if own.sample is not None:
        raise Uncovered
    n = len(own.timesteps) - first
    levels, between = (_levels(x)[first : first + n + 1] for x in (own.sigmas, own.sigmas_interpol))
    sigma, to, i, j = levels[:-1].copy(), levels[1:].copy(), np.arange(0, n, 2), np.arange(1, n, 2)
    to[j], sigma[j] = levels[j], between[j]
    to[i], begins, up = between[i + 1], levels[:-1].copy(), np.zeros(n)
    begins[j] = levels[j - 1]
    if is_ancestral:
        ups, downs = (_levels(x)[first : first + n] for x in (own.sigmas_up, own.sigmas_down))
        to[i], sigma[j], to[j], up[j] = between[i], between[j - 1], downs[j - 1], ups[j - 1]
    factors = _in_two(own, sigma, to - begins, 1, is_given=True)
    return factors._replace(s=up, noisy=(np.arange(n) % 2 == 1).tolist()) if is_ancestral else factors._replace(dt=None)


def _in_two(own: Any, sigma: Array, dt: Array, parts: int, *, is_given: bool) -> Factors:
    """Of two steps each of lengths dt, the second one from the first one's sample, by 1 / parts of its own slope and
    the rest of that one's. is_given: whether steps return the clean sample, and a sample is scaled for the model."""
    (clean, root), n = _clean(own, sigma), len(sigma)
    if n % 2 == 0:  # not of a loop from an end of two steps on
        raise Uncovered
    slope, lengths, past = _slope(clean, sigma), dt[:, None].astype(WIDE), np.zeros((n, 1, 2))
    factors = slope * lengths
    factors[::2, 0] += 1
    factors[1::2] = slope[1::2] / parts * lengths[1::2]
    if parts > 1:
        past[1::2, 0] = slope[: n - 1 : 2] / parts * lengths[1::2]
    past[1::2, 0, 0] += 1
    x, m = factors.T
    scales = _scales(1 / root.astype(WIDE)) if is_given else None
    stored = torch.from_numpy(dt)
    own_clean = clean if is_given else None
    return Factors(x, m, np.zeros(n), own_clean, [False] * n, scales, past, period=2, dt=stored)


def _flow_match_euler(own: Any, first: int) -> Factors:
    """x + (sigma' - sigma) v"""
    if own.config.stochastic_sampling:
        raise Uncovered
    sigmas = _levels(own.sigmas)[first:]
    dt = (sigmas[1:] - sigmas[:-1]).astype(WIDE)
    zero = np.zeros(len(dt))
    return Factors(zero + 1, dt, zero, None, [False] * len(dt))


@np.errstate(all="ignore")
def _lcm(own: Any, first: int) -> Factors:
    """x0' = c_skip x + c_out x0, with noise again to the next level, but for the last step."""
    config = own.config
    if config.thresholding or config.clip_sample:
        raise Uncovered
    t, alphas = own.timesteps.numpy()[first:], _levels(own.alphas_cumprod)
    following = np.append(t[1:], t[-1])
    alpha = alphas[t]
    after = np.where(following >= 0, alphas[following], own.final_alpha_cumprod.numpy())
    signal, noise = _root(alpha).astype(WIDE), _root(1 - alpha).astype(WIDE)
    a, b = {
        "epsilon": lambda: (1 / signal, -noise / signal),
        "v_prediction": lambda: (signal, -noise),
        "sample": lambda: (0 * signal, 0 * signal + 1),
    }[config.prediction_type]()
    scaled = t.astype(np.float32) * np.float32(config.timestep_scaling)
    c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / _root(scaled**2 + 0.25)
    a, b = c_out * a + c_skip, c_out * b
    noisy = np.arange(first, first + len(t)) != own.num_inference_steps - 1
    kept, added = np.where(noisy, _root(after), 1).astype(WIDE), np.where(noisy, _root(1 - after), 0).astype(WIDE)
    return Factors(kept * a, kept * b, added, np.stack([a, b], 1), noisy.tolist())


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
        if config.algorithm_type != "dpmsolver++" or config.thresholding or config.solver_order > 2:
            raise Uncovered
        sigmas = torch.from_numpy(_levels(own.sigmas)[first:])
        sigma = sigmas[:-1].numpy().astype(WIDE)
        if hasattr(own, "precondition_outputs"):  # of the EDM kind
            clean, scales = _edm(own, sigmas[:-1].numpy())
            return cls(torch.ones_like(sigmas), sigmas, -torch.log(sigmas), clean, _scales(scales))
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
def _dpm_solver_multistep(own: Any, first: int) -> Factors:
    """sigma' / sigma x - alpha' (e^-h - 1) (x0 + h / (2 h before) (x0 - x0 before)), by "midpoint": DPM-Solver++(2M)"""
    config, levels = own.config, _Dpm.of(own, first)
    if own.lower_order_nums:
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
    return Factors(x, m, np.zeros(n), None, [False] * n, levels.scales, past)


@np.errstate(all="ignore")
def _dpm_solver_singlestep(own: Any, first: int) -> Factors:
    """Steps as those of order 1, and from the sample before such a one over both: DPM-Solver++(2S)"""
    levels = _Dpm.of(own, first)
    # A row that does not read its own sample is found by least squares.
    if any(x is not None for x in own.model_outputs) or own.config.prediction_type == "sample":
        raise Uncovered
    clean, n, solver = levels.clean, len(levels.clean), own.config.solver_type
    is_second = np.array(own.order_list)[first:] == 2
    is_second[0] = False
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
    return Factors(x, m, np.zeros(n), None, [False] * n, None, past)


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
def _pndm(own: Any, first: int) -> Factors:
    """The plms steps of Liu et al. 2022, whose first one is taken again with the mean of two outputs"""
    config, t = own.config, own.timesteps.numpy()
    length = config.num_train_timesteps // own.num_inference_steps
    is_begun = first or own.counter or own.ets or not config.skip_prk_steps
    if is_begun or len(t) < 4:
        raise Uncovered
    begins = t.copy()
    begins[1] += length
    ends, alphas = begins - length, torch.from_numpy(_levels(own.alphas_cumprod))
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
    return Factors(
        x, factors[:, 0], np.array(none), None, [False] * len(t), None, past, 1, [0.0, float(x[1]), *none[2:]]
    )


@np.errstate(all="ignore")
def _ipndm(own: Any, first: int) -> Factors:
    """Steps to a mean of the last four of beta x + alpha m"""
    if own.ets:
        raise Uncovered
    levels = (torch.from_numpy(_levels(values)[first:]) for values in (own.alphas, own.betas))
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
    return Factors(x, m, np.zeros(n), None, [False] * n, None, factors[:, 1:])


class Form(NamedTuple):
    """A class's expression.

    Attributes:
        factors: of an object and the place of a loop's first timestep.
        settings: of the config, on which it hangs what the expression is. Some of its classes may not have one.
        reads: the attributes that it and the class's own steps read before they write them.
        counter: the one that counts the steps.
    """

    factors: Callable[[Any, int], Factors]
    settings: tuple[str, ...]
    reads: frozenset[str]
    counter: str = "_step_index"


STEPS_READ = frozenset({"timesteps", "_internal_dict", "_step_index", "_begin_index"})
DPM = (
    "algorithm_type", "prediction_type", "solver_order", "solver_type", "lower_order_final", "euler_at_final",
    "final_sigmas_type", "thresholding", "variance_type", "use_flow_sigmas",
)  # fmt: skip
DPM_READ = frozenset({"sigmas", "num_inference_steps", "model_outputs"})
FORMS: Mapping[str, Form] = {
    "DPMSolverMultistepInverseScheduler": Form(
        _dpm_solver_multistep, DPM, (STEPS_READ | DPM_READ | {"lower_order_nums"}) - {"_begin_index"}
    ),
    "DPMSolverMultistepScheduler": Form(_dpm_solver_multistep, DPM, STEPS_READ | DPM_READ | {"lower_order_nums"}),
    "DPMSolverSinglestepScheduler": Form(_dpm_solver_singlestep, DPM, STEPS_READ | DPM_READ | {"order_list"}),
    "EDMDPMSolverMultistepScheduler": Form(_dpm_solver_multistep, DPM, STEPS_READ | DPM_READ | {"lower_order_nums"}),
    "EDMEulerScheduler": Form(_edm_euler, ("prediction_type",), STEPS_READ | {"sigmas"}),
    "EulerAncestralDiscreteScheduler": Form(
        functools.partial(_euler, is_ancestral=True), ("prediction_type",), STEPS_READ | {"sigmas"}
    ),
    "EulerDiscreteScheduler": Form(_euler, ("prediction_type",), STEPS_READ | {"sigmas"}),
    "FlowMatchEulerDiscreteScheduler": Form(_flow_match_euler, ("stochastic_sampling",), STEPS_READ | {"sigmas"}),
    "FlowMatchHeunDiscreteScheduler": Form(_heun, (), STEPS_READ | {"sigmas", "dt"}),
    "HeunDiscreteScheduler": Form(_heun, ("prediction_type", "clip_sample"), STEPS_READ | {"sigmas", "dt"}),
    "IPNDMScheduler": Form(_ipndm, (), STEPS_READ | {"alphas", "betas", "ets", "num_inference_steps"}),
    "KDPM2AncestralDiscreteScheduler": Form(
        functools.partial(_kdpm2, is_ancestral=True),
        ("prediction_type",),
        STEPS_READ | {"sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down", "sample"},
    ),
    "KDPM2DiscreteScheduler": Form(_kdpm2, ("prediction_type",), STEPS_READ | {"sigmas", "sigmas_interpol", "sample"}),
    "LCMScheduler": Form(
        _lcm,
        ("prediction_type", "thresholding", "clip_sample"),
        STEPS_READ | {"alphas_cumprod", "final_alpha_cumprod", "num_inference_steps"},
    ),
    "PNDMScheduler": Form(
        _pndm,
        ("prediction_type", "skip_prk_steps", "num_train_timesteps"),
        frozenset(
            {
                "timesteps",
                "_internal_dict",
                "counter",
                "ets",
                "alphas_cumprod",
                "final_alpha_cumprod",
                "num_inference_steps",
                "prk_timesteps",
            }
        ),
        "counter",
    ),
}
