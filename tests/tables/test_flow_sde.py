"""The rows of flow_sde, against the steps of Flow-GRPO and of DanceGRPO."""

import math

import pytest
import torch
from support.gaussian import take

from ddpm_ext.tables.flow_grids import flow_grid, flow_sigmas
from ddpm_ext.tables.samplers import euler, flow_sde


def flow_grpo(x, v, z, sigma, after, eta, first_after):
    """Liu et al. 2025: x and the velocity v, and noise of standard deviation d sqrt(-dt)."""
    dt = after - sigma
    d = eta * math.sqrt(sigma / (1 - (first_after if sigma == 1 else sigma)))
    return x + (v + d**2 / (2 * sigma) * (x + (1 - sigma) * v)) * dt + d * math.sqrt(-dt) * z


def dance_grpo(x, v, z, sigma, after, eta, _):
    """Xue et al. 2025: the probability flow, and half of eta^2 times the score."""
    x0 = x - sigma * v
    score = -(x - (1 - sigma) * x0) / sigma**2
    return x + (after - sigma) * (v - eta**2 / 2 * score) + eta * math.sqrt(sigma - after) * z


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("name, step", [("flow_grpo", flow_grpo), ("dance_grpo", dance_grpo)])
def test_steps(name, step, steps, eta):
    sigma = [*flow_sigmas(steps, shift=3.0).tolist(), 0.0]
    grid = flow_grid(torch.tensor(sigma[:-1], dtype=torch.float64))
    table = flow_sde(grid, prediction="flow", eta=eta, variant=name, last_noise=True)
    x, v, z = 0.75, -1.25, 0.5
    for i, row in enumerate(table):
        expected = step(x, v, z, sigma[i], sigma[i + 1], eta, sigma[1])
        assert take(row, x, v, z=z)[1] == pytest.approx(expected, rel=1e-11, abs=1e-12)
    clean = flow_sde(grid, prediction="x0", eta=eta, variant=name)
    assert clean.s[-1] == 0
    assert take(clean[len(clean) - 1], x, 0.125)[1] == pytest.approx(0.125)
    if eta == 0:
        for row, other in zip(clean, euler(grid, prediction="x0"), strict=True):
            assert take(row, x, 0.125)[1] == pytest.approx(take(other, x, 0.125)[1], rel=1e-12)
