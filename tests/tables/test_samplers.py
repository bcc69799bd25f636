"""The samplers' rows at a level without signal, and by every prediction, in float64.

tests/peers has the steps themselves: test_diffusers*.py, test_k_diffusion*.py.
"""

import pytest
import torch
from support.sampler_grids import PREDICTIONS, grids

from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import SAMPLERS, ddpm
from ddpm_ext.tables.schedules import make_betas

# They call the model between the grid's timesteps: tests/tables/test_two_calls.py.
BETWEEN = ("edm", "restart", "dpm_2", "dpm_2_ancestral", "dpmpp_2s")


def bayes(alpha, level_before):
    """Weights of x0 and x_t in the mean of q(x_prev | x_t, x0), by completing the square.

    x_prev | x0 ~ N(sqrt(level_before) x0, 1 - level_before) and x_t | x_prev ~ N(sqrt(alpha) x_prev, 1 - alpha).
    """
    if level_before == 1:
        return 1.0, 0.0
    precision = 1 / (1 - level_before) + alpha / (1 - alpha)
    return level_before**0.5 / (1 - level_before) / precision, alpha**0.5 / (1 - alpha) / precision


def apply(table, x, m, z, h=0.0):
    """Takes one step by each row."""
    x0 = (table.a * x + table.b * m).clamp(-1, 1)
    return table.c0 * x0 + table.c1 * x + (table.c2 + table.cu) * m + (table.h1 + table.h2 + table.h3) * h + table.s * z


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_alphas_cumprod_zero(sampler):
    betas = make_betas(torch.tensor([0.1, 0.2, 1.0]), 3)
    levels, descending = (1 - betas).cumprod(0), torch.tensor([2, 1, 0])
    for prediction in PREDICTIONS:
        table = SAMPLERS[sampler](make_grid(levels, descending, betas=betas), prediction=prediction)
        assert table.signal_now[0] == table.g0[0] == 0
        assert (table.a[0], table.b[0]) == {"eps": (2.0**100, -(2.0**100)), "x0": (0, 1), "v": (0, -1)}[prediction]
        # The float64 columns are finite, or there would be no table.
        assert table.packed("cpu").isfinite().all()
    table = ddpm(make_grid(levels, descending, betas=betas))
    x, m = torch.tensor([0.5, -0.25, 1e-3]).double(), torch.tensor([0.25, 0.5, 2e-3]).double()
    assert torch.equal((table.a[0] * x + table.b[0] * m).clamp(-1, 1), (x - m).sign())


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("grid", grids(), ids=["linspace", "trailing", "karras"])
def test_predictions_agree(name, grid):
    """A model that knows x0 and the noise gives the same step by any prediction; EDM's by table 1, for x / root."""
    predictions = (*PREDICTIONS, "flow", "edm", *(() if name in BETWEEN else ("x_prev",)))
    tables = {p: SAMPLERS[name](grid, prediction=p) for p in predictions}
    root, coroot = tables["eps"].signal_now, tables["eps"].noise_now
    coroot = coroot.clamp(min=1e-3)  # rows from clean data call no model
    x0, eps = torch.rand(2, len(root), dtype=torch.float64, generator=torch.Generator().manual_seed(6)) - 0.5
    x, sigma = root * x0 + coroot * eps, coroot / root
    outputs = {
        "eps": eps,
        "x0": x0,
        "v": root * eps - coroot * x0,
        "flow": eps - x0,
        "edm": (x0 - 0.25 / (sigma**2 + 0.25) * x / root) / (0.5 * sigma / (sigma**2 + 0.25).sqrt()),
    }
    if "x_prev" in predictions:
        at = torch.tensor([grid.timestep.tolist().index(t) for t in tables["eps"].timestep.tolist()])
        weights = [bayes(1 - b, k) for b, k in zip(grid.betas.tolist(), grid.after.tolist(), strict=True)]
        of_x0, of_x = torch.tensor(weights, dtype=torch.float64)[at].T
        outputs["x_prev"] = of_x0 * x0 + of_x * x
    kept = tables["x0"].k0 * x0 + tables["x0"].k1 * x
    results = [apply(tables[p], x, m, 0.25, h=0.125) for p, m in outputs.items()]
    assert len(set(tables["eps"].draw.tolist())) == len(root)
    for (p, m), other in zip(outputs.items(), results, strict=True):
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(tables[p].k0 * x0 + tables[p].k1 * x + tables[p].k2 * m, kept, rtol=1e-9, atol=1e-9)
