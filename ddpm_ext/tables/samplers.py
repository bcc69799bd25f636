"""Samplers: each a way to fill the rows of a StepTable. A loop takes them as they are, and so does one kernel.

    x0   = clip(a x + b m)                      predicted clean sample
    prev = c0 x0 + c1 x + c2 m + s z            next sample

All have one signature, sampler(grid, *, prediction="eps", ...) -> StepTable; spacing.py makes grids. Below, a_t stands
for alphas_cumprod where a step starts and a_s for where it arrives.

Rows say what a classifier's gradient g = grad ln p(y | x_t) does to them, too (Dhariwal & Nichol 2021). In ddpm's, it
moves the mean by the variance times g (algorithm 1). In all others, eps becomes eps - sqrt(1 - a_t) g (algorithm 2),
and with it x0, after the clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.tables.predictions import HUGE, PREDICTIONS, Levels, Prediction
from ddpm_ext.tables.spacing import Grid, Jumps
from ddpm_ext.tables.step_table import COLUMNS, StepTable
from ddpm_ext.tables.variances import VARIANCES, Posterior

__all__ = [
    "SAMPLERS",
    "ddim",
    "ddim_inverse",
    "ddpm",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "euler",
    "euler_ancestral",
    "heun",
    "repaint",
]

FEW = 15  # steps, below which DPM-Solver++ takes the last one at first order


def _posterior(grid: Grid | Jumps) -> tuple[Tensor, Tensor, Tensor]:
    """Of q(x_s | x_t, x_0): the weights of x_0 and x_t in its mean, and its variance (Ho et al. 2020, eq. 7)."""
    now, after, betas = grid.now, grid.after, grid.betas
    return (
        betas * after.sqrt() / (1 - now),
        (1 - after) * grid.alphas.sqrt() / (1 - now),
        betas * (1 - after) / (1 - now),
    )


def _levels(grid: Grid | Jumps) -> Levels:
    """Where the grid's steps start."""
    of_x0, of_x, _ = _posterior(grid)
    return Levels(grid.now, of_x0, of_x)


def _prediction(name: str) -> Prediction:
    return PREDICTIONS[checks.one_of("prediction", name, PREDICTIONS)]


def _x0(grid: Grid | Jumps, prediction: str) -> tuple[Tensor, Tensor]:
    """a, b of x0 = a x + b m."""
    return _prediction(prediction).x0(_levels(grid))


def _eps(grid: Grid | Jumps, prediction: str) -> tuple[Tensor, Tensor]:
    """p, q of eps = p x + q m, the noise that an unclipped prediction implies."""
    return _prediction(prediction).eps(_levels(grid))


def _score(grid: Grid | Jumps) -> Tensor:
    """What a classifier's gradient adds to x0 where eps becomes eps - sqrt(1 - a_t) g."""
    root = grid.now.sqrt()
    return torch.where(root < 1 / HUGE, 0.0, (1 - grid.now) / root)


def check_eta(eta: object) -> float:
    if isinstance(eta, bool) or not isinstance(eta, int | float):
        raise TypeError(f"eta is {eta!r}, expected a float")
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta is {eta}, expected a finite eta >= 0")
    return float(eta)


def _sigma(grid: Grid | Jumps, eta: float) -> Tensor:
    """eta times the posterior's standard deviation: Song et al. 2021, eq. (16)."""
    eta = check_eta(eta)
    return eta * _posterior(grid)[2].clamp(min=0).sqrt() if eta else torch.zeros_like(grid.now)


def _implicit(grid: Grid | Jumps, prediction: str, sigma: Tensor, keep_eps: bool) -> StepTable:
    """prev = sqrt(a_s) x0 + sqrt(1 - a_s - sigma^2) eps + sigma z: Song et al. 2021, eq. (12)."""
    now, after = grid.now, grid.after
    direction = (1 - after - sigma**2).clamp(min=0).sqrt()
    a, b = _x0(grid, prediction)
    if keep_eps:
        p, q = _eps(grid, prediction)
        c0, c1, c2, g1 = after.sqrt(), direction * p, direction * q, -direction * (1 - now).sqrt()
    else:
        c1 = direction / (1 - now).sqrt()
        c0, c2, g1 = after.sqrt() - c1 * now.sqrt(), torch.zeros_like(a), torch.zeros_like(a)
    guided = {"g0": _score(grid), "g1": g1}
    return StepTable(grid.timestep, a, b, c0, c1, c2, sigma, now=now, after=after, **guided)


def ddpm(grid: Grid | Jumps, *, prediction: str = "eps", variance: str = "fixed_small") -> StepTable:
    """Ancestral sampling, a draw from the posterior q(x_s | x_t, x_0): Ho et al. 2020, eq. (6), (7) and algorithm 2.

    Over a subset of the timesteps with the betas of Nichol & Dhariwal 2021, section 4: beta = 1 - a_t / a_s.

    Args:
        grid: descending; of Jumps none is the last.
        prediction: what the model predicts, "eps", "x0", "v" (Salimans & Ho 2022) or "x_prev" (the posterior's mean).
        variance: of the noise, which the last step doesn't add:
            "fixed_small": the posterior's, at least 1e-20;
            "fixed_large": beta;
            "learned": the model tells its logarithm beside m;
            "learned_range": the model tells where between those two its logarithm lies, -1 for the small and 1 for the
            large (Nichol & Dhariwal 2021, eq. 15, as guided-diffusion scales it);
            "learned_variance": the model tells it, as diffusers' "learned".

    A classifier's gradient is weighted with the variance, in the last step too. As guided-diffusion has it, a fixed one
    is not clipped there (so it is 0 where the step arrives at clean data); "fixed_large" has there the posterior's of
    the step before, if there is one, which "learned_range" has for its smallest where it arrives at clean data.

    Raises:
        ValueError: an unknown name.
    """
    entry = VARIANCES[checks.one_of("variance", variance, VARIANCES)]
    ends = isinstance(grid, Grid)
    of_x0, of_x, posterior_variance = _posterior(grid)
    a, b = _x0(grid, prediction)
    s, l0, l1, weight = entry.columns(Posterior(posterior_variance, grid.betas, ends))
    if ends:
        s[-1] = 0
    return StepTable(
        timestep=grid.timestep,
        a=a,
        b=b,
        c0=of_x0,
        c1=of_x,
        s=s,
        l0=l0,
        l1=l1,
        g1=weight,
        now=grid.now,
        after=grid.after,
    )


def ddim(grid: Grid | Jumps, *, prediction: str = "eps", eta: float = 0.0, keep_eps: bool = True) -> StepTable:
    """Song et al. 2021, eq. (12), with sigma from eq. (16).

    Args:
        grid: descending.
        prediction: as ddpm's.
        eta: 0 for the deterministic sampler, 1 for DDPM's posterior; finite, >= 0.
        keep_eps: whether, after a clip of x0, the step goes on with the noise that the model predicted (the tutorial,
            diffusers), or with the noise that leads from the clipped x0 to x_t (guided-diffusion, lucidrains; diffusers
            with use_clipped_model_output).

    Raises:
        TypeError, ValueError: `eta` is no finite number >= 0, or an unknown `prediction`.
    """
    return _implicit(grid, prediction, _sigma(grid, eta), keep_eps)


def ddim_inverse(grid: Grid, *, prediction: str = "eps", keep_eps: bool = True) -> StepTable:
    """DDIM's map from noise to data, run backwards: from data to the noise that leads there. Song et al. 2021, eq. (14)
    with the time reversed, as in Dhariwal & Nichol 2021, appendix F: an Euler step up, so exact as steps go to zero.

    Args:
        grid: ascending: make_grid(alphas_cumprod, timesteps from low to high, final=alphas_cumprod of the last).
        prediction, keep_eps: as ddim's, but for "x_prev".

    Raises:
        ValueError: an unknown `prediction`, "x_prev", or a grid that does not ascend.
    """
    if not _prediction(prediction).any_step:
        raise ValueError(f"prediction is {prediction!r}, the mean of a step down, expected another for steps up")
    if not (grid.after < grid.now).all():
        raise ValueError("grid does not ascend in noise, expected alphas_cumprod to fall from step to step")
    return _implicit(grid, prediction, torch.zeros_like(grid.now), keep_eps)


def euler(grid: Grid | Jumps, *, prediction: str = "eps") -> StepTable:
    """Euler's method for the probability flow in sigma: Karras et al. 2022, algorithm 1 without its second half.

    On samples of unit variance, which a loop here holds, that is DDIM's row with eta 0 and the noise rederived from the
    clipped x0; k-diffusion and diffusers hold the same sample divided by sqrt(alphas_cumprod).

    Args, raises: as ddim's.
    """
    return ddim(grid, prediction=prediction, eta=0.0, keep_eps=False)


def euler_ancestral(grid: Grid | Jumps, *, prediction: str = "eps", eta: float = 1.0) -> StepTable:
    """k-diffusion's ancestral Euler: down to less noise than asked, and back up by adding some.

    That is DDIM's row again, with its eta and the noise rederived; only that no step adds more than it ends with.

    Args, raises: as ddim's.
    """
    sigma = torch.minimum(_sigma(grid, eta), (1 - grid.after).sqrt())
    return _implicit(grid, prediction, sigma, keep_eps=False)


# ------------------------------------------------------------------------------------------ of second order


def _dpm_solver(grid: Grid, prediction: str, eta: float, lower_order_final: bool) -> StepTable:
    """DPM-Solver++(2M) on the probability flow (eta 0), on the SDE (1), or in between."""
    now, after = grid.now, grid.after
    half_log_snr = (grid.alphas_cumprod.log() - torch.log1p(-grid.alphas_cumprod)) / 2
    h = half_log_snr.diff()
    extra = eta * h if eta else torch.zeros_like(h)  # 0 even where h is infinite
    towards_x0 = -after.sqrt() * torch.expm1(-h - extra)
    # x0 is carried on to the middle of the step, by this much of its change over the last one
    onward = torch.zeros_like(h)
    onward[1:] = h[1:] / (2 * h[:-1])
    onward[~onward.isfinite()] = 0
    if lower_order_final and len(grid) < FEW:
        onward[-1] = 0
    a, b = _x0(grid, prediction)
    return StepTable(
        timestep=grid.timestep,
        a=a,
        b=b,
        c0=towards_x0 * (1 + onward),
        c1=((1 - after) / (1 - now)).sqrt() * torch.exp(-extra),
        s=(1 - after).sqrt() * (-torch.expm1(-2 * extra)).sqrt(),
        c3=-towards_x0 * onward,
        g0=_score(grid),
        now=now,
        after=after,
    )


def dpmpp_2m(grid: Grid, *, prediction: str = "eps", lower_order_final: bool = True) -> StepTable:
    """DPM-Solver++(2M): Lu et al. 2022b ("DPM-Solver++"), algorithm 2.

    The first step is of first order, having no history; and so is the last one where it arrives at clean data, or of
    fewer than 15 steps, as in diffusers.

    Args:
        grid: descending.
        prediction: as ddpm's.
        lower_order_final: whether the last of fewer than 15 steps is of first order.

    Raises:
        ValueError: an unknown `prediction`.
    """
    return _dpm_solver(grid, prediction, 0.0, lower_order_final)


def dpmpp_2m_sde(grid: Grid, *, prediction: str = "eps", eta: float = 1.0, lower_order_final: bool = True) -> StepTable:
    """SDE-DPM-Solver++(2M): Lu et al. 2022b, in diffusers' "midpoint" form, with k-diffusion's eta.

    The first and the last step are as dpmpp_2m's.

    Args:
        grid: descending.
        prediction: as ddpm's.
        eta: 1 for the SDE, 0 for dpmpp_2m; finite, >= 0.
        lower_order_final: as dpmpp_2m's.

    Raises:
        TypeError, ValueError: `eta` is no finite number >= 0, or an unknown `prediction`.
    """
    return _dpm_solver(grid, prediction, check_eta(eta), lower_order_final)


def heun(grid: Grid, *, prediction: str = "eps") -> StepTable:
    """Heun's method for the probability flow in sigma: Karras et al. 2022, algorithm 1, without churn.

    A step is two rows, hence two calls of the model: Euler's, to a first x at the next timestep; and its correction by
    the slope found there. On x / sqrt(alphas_cumprod), with r = sigma before / sigma after, that adds
    (r - 1) / 2 (x0 - x0 of the Euler row), so the sample before both need not be kept. The last step is Euler's alone,
    as is one from pure noise, where sigma is infinite: len(grid) steps are up to 2 len(grid) - 1 rows.

    Args, raises: as dpmpp_2m's.
    """
    start = euler(grid, prediction=prediction)
    middle = grid.after[:-1]
    ratio = ((1 - grid.now[:-1]) / grid.now[:-1] * middle / (1 - middle)).sqrt()
    half = middle.sqrt() * (ratio - 1) / 2
    zeros = torch.zeros_like(half)
    correction = {
        **{name: getattr(start, name)[1:] for name in ("timestep", "a", "b", "g0")},
        **{"c0": half, "c1": torch.ones_like(half), "c3": -half, "now": middle, "after": middle},
    }
    finite = torch.stack([torch.ones_like(ratio), ratio], 1).flatten().isfinite()
    columns = {}
    for name in ("timestep", "a", "b", "c0", "c1", "c3", "g0", "now", "after"):
        euler_rows = getattr(start, name)
        pairs = torch.stack([euler_rows[:-1], correction.get(name, zeros)], 1).flatten()
        columns[name] = torch.cat([pairs[finite], euler_rows[-1:]])
    return StepTable(**columns)


SAMPLERS: dict[str, Callable[..., StepTable]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
}
WITH_ETA = ("ddim", "euler_ancestral", "dpmpp_2m_sde")


# -------------------------------------------------------------------------------------------- tables of tables


def repaint(table: StepTable, *, jump_length: int = 10, jump_n_sample: int = 10) -> StepTable:
    """The table with jumps back to more noise in between, so that what is painted into a known image comes to fit it:
    RePaint, Lugmayr et al. 2022, algorithm 1, in the order of its authors' get_schedule_jump.

    Counted from the last row, every `jump_length` rows, the loop goes back over that many rows and takes them again,
    until it has taken them `jump_n_sample` times. A jump is one row, a step of the forward process: prev = c1 x + s z,
    c1^2 = after / now, s^2 = 1 - c1^2. The model has no part in it (a = b = c0 = c2 = 0); its timestep is where it
    starts from. Draws are made anew, each row another one.

    Args:
        table: of a sampler here, descending, its columns now and after filled, without history.
        jump_length: rows that a jump goes back, at least 1.
        jump_n_sample: how many times each stretch is taken, at least 1: no jumps.

    Raises:
        TypeError: no StepTable, or no ints.
        ValueError: out of range; a table that does not go down from each row to the next, or has history (c3).
    """
    if not isinstance(table, StepTable):
        raise TypeError(f"table is a {type(table).__name__}, expected a StepTable")
    length = checks.integer("jump_length", jump_length, 2**31, "2^31", start=1)
    passes = checks.integer("jump_n_sample", jump_n_sample, 2**31, "2^31", start=1)
    table = table.to("cpu")
    if (table.c3 != 0).any():
        raise ValueError("table has history (c3), which a jump would make another step's, expected one without")
    if not (table.now < table.after).all() or not torch.equal(table.now[1:], table.after[:-1]):
        raise ValueError("table does not descend, expected now < after in each row, and each to start where one ended")

    rows = len(table)
    jumps = dict.fromkeys(range(0, rows - length, length), passes - 1)  # by the number of rows yet to come after it
    order: list[tuple[int, int]] = []  # the row, and how far back from it a jump goes
    i = 0
    while i < rows:
        if jumps.get(rows - 1 - i, 0) > 0:
            jumps[rows - 1 - i] -= 1
            order.append((i, length))
            i -= length
        order.append((i, 0))
        i += 1
    row, back = torch.tensor(order, device="cpu").T
    jump = back > 0
    now, after = table.now[row], torch.where(jump, table.now[row - back], table.after[row])
    kept = after / now
    forward = {"c1": kept.sqrt(), "s": (1 - kept).sqrt(), "now": now, "after": after}
    columns = {
        name: torch.where(jump, forward.get(name, torch.zeros_like(now)), getattr(table, name)[row])
        for name in COLUMNS
        if name not in ("timestep", "draw")
    }
    return StepTable(timestep=table.timestep[row], **columns)
