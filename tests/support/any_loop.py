"""Random loops: their schedules, predictions, samplers and timesteps are drawn from all that ddpm_ext has.

The levels of a schedule and a model's exact output are computed here by the papers' definitions, and ddpm_ext's are
compared with them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import pytest
import torch

from ddpm_ext import GaussianDiffusion, Guidance
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import make_loop_rows
from ddpm_ext.tables import SPACINGS
from ddpm_ext.tables.flow_grids import FLOW_SPACINGS
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.predictions import PREDICTIONS, Levels
from ddpm_ext.tables.samplers import SAMPLERS, WITH_ETA
from ddpm_ext.tables.schedules import SCHEDULES, NoiseSchedule, edm, make_betas, rescale_zero_terminal_snr, sigma_space
from ddpm_ext.tables.sigma_grids import ALIGN_YOUR_STEPS, SIGMA_GRIDS

F64 = torch.float64
T = 400
SIGMAS = torch.linspace(np.log(0.02), np.log(60), T, dtype=F64).exp()
RISING = torch.linspace(0.02, 1, T, dtype=F64)
OWN = {
    "betas": torch.linspace(1e-3, 0.05, T, dtype=F64),
    "zero terminal SNR": rescale_zero_terminal_snr(make_betas("scaled_linear", T)),
    "edm": edm(SIGMAS),
    "sigma space": sigma_space(SIGMAS, lambda signal, noise: noise),
    "levels": NoiseSchedule(1.2 - RISING**2, RISING.sqrt()),
}
# By schedule, the signal and the noise as functions of t, the timestep that the model gets. Only these schedules define
# them by formulas in t.
BY_TIMESTEP = {
    "flow": lambda t: (1 - t / 1000, t / 1000),
    "edm": lambda t: (1 / np.hypot(np.exp(4 * t), 0.5), np.exp(4 * t) / np.hypot(np.exp(4 * t), 0.5)),
    "sigma space": lambda t: (1.0, t),
}
SPACED_BY = ("timesteps", "sections", None, *SPACINGS)  # the ways to choose a loop's timesteps


@functools.cache
def process(schedule, prediction="x0"):
    return GaussianDiffusion(T, OWN.get(schedule, schedule), prediction=prediction, backend="reference")


@functools.cache
def nodes(schedule):
    """The signal and the noise at each timestep of a schedule. For betas they follow from the product of 1 - beta."""
    schedule_or_betas = OWN[schedule] if schedule in OWN else SCHEDULES[schedule](T)
    if isinstance(schedule_or_betas, NoiseSchedule):
        return schedule_or_betas.signal.numpy(), schedule_or_betas.noise.numpy()
    alphas_cumprod = np.cumprod(1 - schedule_or_betas.numpy())
    return np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)


def ends(schedule):
    """The least and the greatest noise / signal of a schedule."""
    signal, noise = nodes(schedule)
    return noise[0] / signal[0], noise[-1] / signal[-1] if signal[-1] else np.inf


def true_level(schedule, t):
    """The signal and the noise of the samples for which the model gets t.

    Between two timesteps, log(noise / signal) is linear in t. For a schedule of betas, signal^2 + noise^2 is 1. For
    other schedules, (signal, noise) is on the line through the levels of the two timesteps.
    """
    if schedule in BY_TIMESTEP:
        return BY_TIMESTEP[schedule](t)
    signal, noise = nodes(schedule)
    low = int(t)
    if t == low:
        return signal[low], noise[low]
    p, p1, q, q1 = *signal[low : low + 2], *noise[low : low + 2]
    sigma = (q / p) ** (low + 1 - t) * (q1 / p1) ** (t - low)
    if process(schedule).schedule.scale is None:
        return 1 / np.hypot(1, sigma), sigma / np.hypot(1, sigma)
    share = (sigma * p - q) / (q1 - q - sigma * (p1 - p))
    return p + share * (p1 - p), q + share * (q1 - q)


def bayes(alpha, before):
    """The weights of x0 and x_t in the mean of q(x_prev | x_t, x0), by completing the square.

    x_prev | x0 ~ N(sqrt(before) x0, 1 - before) and x_t | x_prev ~ N(sqrt(alpha) x_prev, 1 - alpha).
    """
    if before == 1:
        return 1.0, 0.0
    precision = 1 / (1 - before) + alpha / (1 - alpha)
    return before**0.5 / (1 - before) / precision, alpha**0.5 / (1 - alpha) / precision


def of_edm(signal, noise):
    """The weights of x0 and eps in the output F of EDM, with sigma_data = 0.5.

    x0 = c_skip x + c_out F, for x = x0 + sigma eps (Karras et al. 2022, table 1).
    """
    sigma, power = noise / signal, (noise / signal) ** 2 + 0.25
    skip, out = 0.25 / power, 0.5 * sigma / power**0.5
    return (1 - skip) / out, -skip * sigma / out


# The weights of x0 and eps in a model's output, by the prediction, for x = signal x0 + noise eps with
# signal^2 + noise^2 = 1.
DEFINED = {
    "eps": lambda signal, noise: (0, 1),
    "x0": lambda signal, noise: (1, 0),
    "v": lambda signal, noise: (-noise, signal),
    "flow": lambda signal, noise: (-1, 1),
    "edm": of_edm,
}


def of_a_model(schedule, prediction, row):
    """The weights of x0 and eps in the model's output at the level before a row. They are those of the training target.

    Checks the target of ddpm_ext by `bayes` for x_prev, and by DEFINED for other predictions where signal is not 0.
    """
    power = np.hypot(row.signal_now, row.noise_now)
    signal, noise = row.signal_now / power, row.noise_now / power
    step, expected = (0.0, 0.0), None
    if not PREDICTIONS[prediction].any_step:  # x_prev, which is one timestep of the schedule before x
        alphas_cumprod, t = nodes(schedule)[0] ** 2, int(row.timestep)
        before = alphas_cumprod[t - 1] if t else 1.0
        step = bayes(alphas_cumprod[t] / before, before)
        expected = step[0] + step[1] * signal, step[1] * noise
    elif prediction in DEFINED and signal:
        expected = DEFINED[prediction](signal, noise)
    levels = Levels(*(torch.tensor([value], dtype=F64) for value in (signal**2, *step)))
    trained = [weight.item() for weight in PREDICTIONS[prediction].target(levels)]
    assert expected is None or trained == pytest.approx(expected, rel=1e-9, abs=1e-12), prediction
    return trained


class AnyLoop(NamedTuple):
    """The options of a loop.

    scale, interval: of the guidance. other: the unconditional output is the exact one for data whose mean is `other`
        times the mean of the conditional data.
    """

    schedule: str
    prediction: str
    sampler: str
    options: dict
    scale: float = 1.0
    other: float = 1.0
    interval: tuple[float, float] | None = None

    def table(self):
        """The step table of the loop."""
        guidance = Guidance(self.scale, lambda x, t: x, interval=self.interval)
        options = LoopOptions(sampler=self.sampler, guidance=guidance, **self.options)
        return make_loop_rows(process(self.schedule, self.prediction), options).table

    def begins_blind(self, table):
        """Whether the first output does not depend on x0.

        This is so if the loop starts from noise alone and the model predicts the noise.
        """
        return table.signal_now[0] == 0 and not PREDICTIONS[self.prediction].without_signal

    def model(self, knows):
        """A model for gaussian.weights. knows(row, x, mean) returns x0 and eps of x, for data of this mean."""

        def outputs(row, x, mean):
            of_x0, of_eps = of_a_model(self.schedule, self.prediction, row)
            m, u = (of_x0 * x0 + of_eps * eps for x0, eps in (knows(row, x, k * mean) for k in (1.0, self.other)))
            low, high = self.interval or (-np.inf, np.inf)
            return (u + self.scale * (m - u), u) if low <= row.timestep <= high else (m, m)

        return outputs


def fits(schedule, how):
    """Whether the levels that the spacing `how` needs are within the levels of the schedule."""
    if how not in SIGMA_GRIDS:
        return True
    if schedule == "flow":
        return how in FLOW_SPACINGS
    least, greatest = ends(schedule)
    published = {"align_your_steps": "sd15"}.get(how, how.removeprefix("align_your_steps_"))
    return least > 0 and greatest < np.inf and greatest > ALIGN_YOUR_STEPS.get(published, (0.0,))[0]


@functools.cache
def between(sampler):
    """Whether a sampler calls the model between the timesteps of its grid."""
    levels = process("linear").alphas_cumprod
    return SAMPLERS[sampler](make_grid(levels, list(range(380, 0, -20)))).timestep.is_floating_point()


def any_loop(choose, least=1):
    """A random AnyLoop of `least` to 20 steps."""
    prediction = choose.one_of([*PREDICTIONS], "prediction")
    any_step = PREDICTIONS[prediction].any_step
    sampler = choose.one_of([name for name in SAMPLERS if any_step or not between(name)], "sampler")
    schedules = [name for name in (*SCHEDULES, *OWN) if any_step or process(name).schedule.scale is None]
    schedule = choose.one_of(schedules, "schedule")
    by = choose.one_of([how for how in SPACED_BY if fits(schedule, how) and (any_step or how not in SIGMA_GRIDS)], "by")
    steps = choose.integer(least, 20, "steps")
    options = {"steps": steps, "spacing": by}
    if by == "timesteps":
        last = choose.integer(T - 2, T - 1, "last")
        options = {"timesteps": np.linspace(last, 1, steps).round().astype(int).tolist()}
    elif by == "sections":
        options = {"spacing": f"{steps},3"}
    if sampler in WITH_ETA and sampler != "tcd":
        options["eta"] = choose.one_of([None, 0.0, 0.5], "eta")
    return AnyLoop(schedule, prediction, sampler, options)
