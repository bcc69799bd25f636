"""ddpm's variances and a classifier's gradient in its rows, against guided-diffusion's formulas in float64."""

import math

import numpy as np
import pytest
import torch
from support.gaussian import push, take

from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import SAMPLERS, ddim, ddim_inverse, ddpm
from ddpm_ext.tables.schedules import make_betas
from ddpm_ext.tables.sigma_grids import karras_grid
from ddpm_ext.tables.spacing import spaced_timesteps
from ddpm_ext.tables.variances import VARIANCES

LEARNED = ("learned", "learned_range", "learned_variance")
PREDICTIONS = ("eps", "x0", "v")


def schedule(name="linear", timesteps=1000):
    betas = make_betas(name, timesteps)
    return betas, (1 - betas).cumprod(0)


def full_grid(name="linear", timesteps=1000):
    betas, levels = schedule(name, timesteps)
    return make_grid(levels, torch.arange(timesteps - 1, -1, -1), betas=betas)


def random(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).numpy()


class Posterior:
    """p(x_{t-1} | x_t) of a timestep of a schedule: Ho et al. 2020, Nichol & Dhariwal 2021, Dhariwal & Nichol 2021.

    `betas` belong to the steps that are taken, in ascending order.
    """

    def __init__(self, betas, t):
        levels = np.cumprod(1 - betas)
        before = np.append(1.0, levels[:-1])
        small = betas * (1 - before) / (1 - levels)
        self.now, self.before = levels[t], before[t]
        self.beta, self.small = betas[t], small[t]
        self.small_above = small[max(t, 1)] if len(betas) > 1 else betas[0]
        self.of_x0 = betas[t] * before[t] ** 0.5 / (1 - levels[t])
        self.of_x = (1 - before[t]) * (1 - betas[t]) ** 0.5 / (1 - levels[t])

    def variance(self, name, v):
        """The variance that multiplies a gradient in guided-diffusion."""
        if name == "fixed_small":
            return self.small
        if name == "fixed_large":
            return self.small_above if self.before == 1 else self.beta
        if name == "learned_variance":
            return v
        if name == "learned":
            return np.exp(v)
        share = (v + 1) / 2
        smallest = self.small or self.small_above
        return np.exp(share * math.log(self.beta) + (1 - share) * math.log(max(smallest, 1e-20)))

    def step(self, name, x0, x, v, z, g):
        """A step whose mean is shifted by a classifier's gradient: Dhariwal & Nichol 2021, algorithm 1."""
        variance = self.variance(name, v)
        noise = 0.0 if self.before == 1 else np.sqrt(variance) * z
        return self.of_x0 * x0 + self.of_x * x + variance * g + noise


# --------------------------------------------------------------------------------------------------- variances


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name, count", [("linear", 1000), ("cosine", 60), ("linear", 1)])
def test_step_is_guided_diffusions(name, count, variance):
    """With and without a gradient, over all timesteps, and over a few of them, whose steps are merged."""
    betas, levels = schedule(name, 1000)
    timesteps = spaced_timesteps(1000, count, "trailing")
    table = ddpm(make_grid(levels, timesteps, betas=betas), variance=variance)
    taken = levels[timesteps.flip(0)].numpy()
    merged = betas.numpy() if count == 1000 else 1 - taken / np.append(1.0, taken[:-1])
    x, m, v, z, g = random(5, count, 3, seed=0)
    v = v.clip(-1, 1) if variance == "learned_range" else np.abs(v) if variance == "learned_variance" else v - 3
    for i, row in enumerate(table):
        truth = Posterior(merged, count - 1 - i)
        x0 = np.clip((x[i] - (1 - truth.now) ** 0.5 * m[i]) / truth.now**0.5, -1, 1)
        given = {"v": v[i] if variance in LEARNED else None, "v_is_variance": variance == "learned_variance"}
        for gradient in (np.zeros(3), g[i]):
            found_x0, found = take(row, x[i], m[i], z=z[i], g=gradient, clip=(-1, 1), **given)
            assert found_x0 == pytest.approx(x0, rel=1e-9, abs=1e-9)
            expected = truth.step(variance, x0, x[i], v[i], z[i], gradient)
            assert found == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_rows_of_learned_variances_have_their_columns():
    grid = full_grid(timesteps=50)
    fixed = ddpm(grid)
    for variance in LEARNED:
        table = ddpm(grid, variance=variance)
        assert table.plain == (variance == "learned_variance")  # the rows of other samplers do not have l0 and l1
        assert table.s.tolist() == [1.0] * 49 + [0.0]
        assert table.g1.tolist() == [1.0] * 50
        assert fixed.diff(table).columns.keys() <= {"s", "l0", "l1", "g1"}
    assert fixed.plain


def grids():
    _, levels = schedule("scaled_linear")
    return [
        make_grid(levels, spaced_timesteps(1000, 20)),
        make_grid(levels, spaced_timesteps(1000, 9, "trailing"), final=levels[0].item()),
        karras_grid(levels, 12),
    ]


def score_tables(grid, prediction):
    for name in SAMPLERS:
        table = SAMPLERS[name](grid, prediction=prediction)
        if table.cu.any():  # the eps by which CFG++ renoises has no gradient
            assert table.g0.any() and not table.g1.any()
        elif name != "ddpm":
            yield table
    yield ddim(grid, prediction=prediction, eta=0.6)
    yield ddim(grid, prediction=prediction, eta=1.0, keep_eps=False)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("grid", [*grids(), "up"], ids=["linspace", "trailing", "karras", "up"])
def test_gradient_is_another_eps(grid, prediction):
    """eps - sqrt(1 - a_t) g replaces eps, also for other predictions, and in what rows keep: Dhariwal & Nichol 2021,
    algorithm 2."""
    if grid == "up":
        _, levels = schedule("scaled_linear")
        up = make_grid(levels, [0, 200, 400, 700], final=levels[999].item())
        tables = [ddim_inverse(up, prediction=prediction, keep_eps=keep) for keep in (False, True)]
    else:
        tables = [*score_tables(grid, prediction)]
    for table in tables:
        x, m, h1, h2, h3, z, g = random(7, len(table), 3, seed=1)
        for i, row in enumerate(table):
            of_eps, of_x0 = -row.noise_now, (1 - row.signal_now**2) / row.signal_now
            of_v = row.signal_now * of_eps - row.noise_now * of_x0
            shift = {"eps": of_eps, "x0": of_x0, "v": of_v}[prediction]
            history, other = [h1[i], h2[i], h3[i]], m[i] + shift * g[i]
            guided = take(row, x[i], m[i], z[i], g=g[i], history=history)
            expected = take(row, x[i], other, z[i], history=history)
            kept = [push(row, [], x0, x[i], m) for (x0, _), m in ((guided, m[i]), (expected, other))]
            for here, there in zip((*guided, *kept[0]), (*expected, *kept[1]), strict=True):
                assert here == pytest.approx(there, rel=1e-9, abs=1e-9)
