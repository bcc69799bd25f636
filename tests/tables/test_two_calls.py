"""Samplers whose steps are two calls of the model, and those that add noise between steps, against the papers'
algorithms on y = x / sqrt(alphas_cumprod) in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.gaussian import calls_model, loop

from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import SAMPLERS, edm, heun, restart
from ddpm_ext.tables.schedules import make_betas
from ddpm_ext.tables.sigma_grids import karras_grid
from ddpm_ext.tables.spacing import spaced_timesteps

LEVELS = (1 - make_betas("scaled_linear", 1000)).cumprod(0)
LOG_SIGMA = np.log(1 / LEVELS.numpy() - 1) / 2
GRIDS = {
    "linspace": make_grid(LEVELS, spaced_timesteps(1000, 8)),
    "noisy": make_grid(LEVELS, spaced_timesteps(1000, 6, "trailing"), final=LEVELS[0].item()),
    "karras": karras_grid(LEVELS, 11),
    "one": make_grid(LEVELS, [400]),
}
grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
clips = pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])


class Denoiser:
    """x0 of a model that returns given eps. It notes the sigmas at which it is asked."""

    def __init__(self, outputs, clip):
        self.outputs, self.clip, self.asked = iter(outputs), clip, []

    def __call__(self, y, sigma):
        self.asked.append(sigma)
        x0 = y - sigma * next(self.outputs)
        return x0 if self.clip is None else np.clip(x0, *self.clip)


def heun_step(denoise, y, sigma, after, last):
    """Karras et al. 2022, algorithm 1, lines 4 to 8."""
    slope = (y - denoise(y, sigma)) / sigma
    end = y + (after - sigma) * slope
    if last:
        return end
    return y + (after - sigma) * (slope + (end - denoise(end, after)) / after) / 2


def assert_follows(table, grid, clip, algorithm, near=1e-10):
    """That a loop over the rows is algorithm(denoise, y, sigmas, noise), which returns y at the end."""
    generator = torch.Generator().manual_seed(3)
    outputs, noise = torch.randn(2, 300, 4, dtype=torch.float64, generator=generator).numpy()
    x = outputs[-1]
    sigmas = (1 / grid.alphas_cumprod - 1).sqrt().tolist()
    denoise = Denoiser(outputs, clip)
    expected = algorithm(denoise, x / grid.now[0].item() ** 0.5, sigmas, iter(noise))

    given = iter(outputs)
    rows, _, reached = zip(*loop(table, x, lambda row, x: next(given), iter(noise), clip=clip), strict=True)
    x, calls = reached[-1], [row for row in rows if calls_model(row)]
    assert x == pytest.approx(expected * table.signal_after[-1].item(), rel=near, abs=near)
    assert [row.noise_now / row.signal_now for row in calls] == pytest.approx(denoise.asked, rel=1e-12)
    # log sigma is linear between timesteps, and past the last one there is no other.
    timesteps = np.interp(np.log(denoise.asked), LOG_SIGMA, np.arange(1000))
    assert [row.timestep for row in calls] == pytest.approx(timesteps, abs=1e-8)
    ends = [level[i].item() for level in grid.pairs for i in (0, -1)]
    assert [table.signal_now[0], table.signal_after[-1], table.noise_now[0], table.noise_after[-1]] == ends
    assert torch.equal(table.signal_now[1:], table.signal_after[:-1])
    assert torch.equal(table.noise_now[1:], table.noise_after[:-1])


@clips
@grids
@pytest.mark.parametrize(
    "churn", [{}, {"s_churn": 3.0, "s_tmin": 0.1, "s_tmax": 4.0, "s_noise": 1.1}, {"s_tmax": math.inf}, {"s_churn": 0}]
)
def test_edm(grid, clip, churn):
    """Karras et al. 2022, algorithm 2, and the defaults of their table 5."""
    options = {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003, **churn}

    def algorithm(denoise, y, sigmas, noise):
        steps = len(sigmas) - 1
        for i, (sigma, after) in enumerate(pairwise(sigmas)):
            if options["s_churn"] and options["s_tmin"] <= sigma <= options["s_tmax"]:
                hat = sigma * (1 + min(options["s_churn"] / steps, math.sqrt(2) - 1))
                y = y + math.sqrt(hat**2 - sigma**2) * options["s_noise"] * next(noise)
                sigma = hat
            y = heun_step(denoise, y, sigma, after, i == steps - 1)
        return y

    table = edm(grid, **churn)
    assert_follows(table, grid, clip, algorithm)
    # The noise takes no launch of its own but before the first step.
    assert len(table) == 2 * len(grid) - 1 + bool((table.b == 0).any())
    assert (table.b[1:] != 0).all()
    if not options["s_churn"]:
        assert table == heun(grid)


@clips
@grids
@pytest.mark.parametrize(
    "intervals",
    [None, [(4, 1, 0.5, 3.0)], [(3, 2, 0.06, 0.3), (2, 3, 1.0, 2.0), (2, 1, 0.055, 1.0)], [(5, 1, 2.0, 90.0)], []],
)
def test_restart(grid, clip, intervals):
    """Xu et al. 2023, section 3. Noise leads from t_min to t_max in the launch of the step before."""
    used = [(3, 2, 0.06, 0.30)] if intervals is None else intervals

    def algorithm(denoise, y, sigmas, noise):
        for i, (sigma, after) in enumerate(pairwise(sigmas)):
            y = heun_step(denoise, y, sigma, after, i == len(sigmas) - 2)
            for n, k, low, high in used:
                nearest = min(sigmas[1:-1], key=lambda s, low=low: abs(s - low), default=None)
                if after != nearest or not after < high <= sigmas[0]:
                    continue
                rho = np.linspace(high ** (1 / 7), after ** (1 / 7), n) ** 7
                for _ in range(k):
                    y = y + math.sqrt(high**2 - after**2) * 1.1 * next(noise)
                    for start, end in pairwise(rho):
                        y = heun_step(denoise, y, start, end, last=False)
        return y

    table = restart(grid, s_noise=1.1, **({} if intervals is None else {"intervals": intervals}))
    assert_follows(table, grid, clip, algorithm)
    assert (table.b != 0).all()
    if not used:
        assert table == heun(grid)


@clips
@grids
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0, 40.0])
@pytest.mark.parametrize("name", ["dpm_2", "dpm_2_ancestral", "dpmpp_2s"])
def test_midpoints(grid, clip, name, eta):
    """Lu et al. 2022, algorithm 1, and 2022b, algorithm 1, down to less noise; eta 40 leaves none to step down to."""
    if name == "dpm_2":
        eta = 0.0

    def algorithm(denoise, y, sigmas, noise):
        for sigma, after in pairwise(sigmas):
            up = min(after, eta * math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2))
            down = math.sqrt(after**2 - up**2)
            x0 = denoise(y, sigma)
            if down == 0:
                y = x0
            else:
                middle = math.sqrt(sigma * down)
                between = y + (middle - sigma) * (y - x0) / sigma
                x0 = denoise(between, middle)
                of_eps = y + (down - sigma) * (between - x0) / middle
                y = down / sigma * (y - x0) + x0 if name == "dpmpp_2s" else of_eps
            if up > 0:
                y = y + up * next(noise)
        return y

    table = SAMPLERS[name](grid, **({} if name == "dpm_2" else {"eta": eta}))
    # The root of a difference of numbers near 1, where a step removes all the noise that there was.
    assert_follows(table, grid, clip, algorithm, near=1e-7 if eta == 40 else 1e-10)
    assert eta < 40 or len(table) == len(grid)
