"""The samplers' rows against Bayes' rule and the papers' formulas, in float64."""

import pytest
import torch
from support.sampler_grids import PREDICTIONS, grids, schedule

from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import SAMPLERS, ddim, ddim_inverse, ddpm, euler, euler_ancestral, lcm
from ddpm_ext.tables.schedules import make_betas

STOCHASTIC = ("ddim", "dpmpp_2s", "sa_solver", "tcd")  # have eta, as those with "ancestral" or "sde" in their names
# They call the model between the grid's timesteps: tests/tables/test_two_calls.py.
BETWEEN = ("edm", "restart", "dpm_2", "dpm_2_ancestral", "dpmpp_2s")


def close(actual, expected, rtol=2e-13, atol=0.0):  # measured 4.5e-14 (cosine), factor 4
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def bayes(alpha, level_before):
    """Weights of x0 and x_t in the mean of q(x_prev | x_t, x0), and its variance, by completing the square.

    x_prev | x0 ~ N(sqrt(level_before) x0, 1 - level_before) and x_t | x_prev ~ N(sqrt(alpha) x_prev, 1 - alpha).
    """
    if level_before == 1:
        return 1.0, 0.0, 0.0
    precision = 1 / (1 - level_before) + alpha / (1 - alpha)
    return level_before**0.5 / (1 - level_before) / precision, alpha**0.5 / (1 - alpha) / precision, 1 / precision


def apply(table, x, m, z, clip=True, h=0.0):
    """Takes one step by each row."""
    x0 = table.a * x + table.b * m
    x0 = x0.clamp(-1, 1) if clip else x0
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


def sigmas(grid):
    """Sigma where each step starts and where it ends: the noise's standard deviation for a signal of scale 1."""
    return (1 / grid.now - 1).sqrt(), (1 / grid.after - 1).sqrt()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0, 40.0])
@pytest.mark.parametrize("grid", grids(), ids=["linspace", "trailing", "karras"])
def test_eulers_methods_are_k_diffusions(grid, eta, clip):
    """On x / sqrt(alphas_cumprod), the derivative by sigma is (x - x0) / sigma: Karras et al. 2022, eq. (4) and (5)."""
    table = euler_ancestral(grid, eta=eta)
    x, m, z = torch.randn(3, len(grid), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    sigma, after = sigmas(grid)
    up = torch.minimum(after, eta * (after**2 * (sigma**2 - after**2) / sigma**2).sqrt())
    down, x0 = (after**2 - up**2).clamp(min=0).sqrt(), table.a * x + table.b * m
    x0 = x0.clamp(-1, 1) if clip else x0
    outer = x / grid.now.sqrt()
    expected = (outer + (down - sigma) * (outer - x0) / sigma + up * z) * grid.after.sqrt()
    # With noise, the root of a difference of numbers near 1, if one step removes nearly all of it.
    tolerance = 1e-11 if eta == 0 else 1e-7
    close(apply(table, x, m, z, clip), expected, rtol=tolerance, atol=tolerance)
    assert eta or table == euler(grid)


@pytest.mark.parametrize("keep_eps", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_inversion_inverts(prediction, keep_eps):
    """A step up and, with the prediction at its end, a step down give x again, up to float64 rounding."""
    _, levels = schedule("linear")
    up = ddim_inverse(make_grid(levels, [200], final=levels[300].item()), prediction=prediction, keep_eps=keep_eps)
    down = ddim(make_grid(levels, [300], final=levels[200].item()), keep_eps=keep_eps)
    assert torch.equal(up.s, torch.zeros(1, dtype=torch.float64))
    x, m = torch.randn(2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    eps = (x - levels[200].sqrt() * (up.a * x + up.b * m)) / (1 - levels[200]).sqrt()
    close(apply(down, apply(up, x, m, 0, clip=False), eps, 0, clip=False), x, rtol=1e-12, atol=1e-12)


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
        weights = [bayes(1 - b, k)[:2] for b, k in zip(grid.betas.tolist(), grid.after.tolist(), strict=True)]
        of_x0, of_x = torch.tensor(weights, dtype=torch.float64)[at].T
        outputs["x_prev"] = of_x0 * x0 + of_x * x
    kept = tables["x0"].k0 * x0 + tables["x0"].k1 * x
    results = [apply(tables[p], x, m, 0.25, h=0.125) for p, m in outputs.items()]
    assert len(set(tables["eps"].draw.tolist())) == len(root)
    for (p, m), other in zip(outputs.items(), results, strict=True):
        close(other, results[0], rtol=1e-9, atol=1e-9)
        close(tables[p].k0 * x0 + tables[p].k1 * x + tables[p].k2 * m, kept, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scaling", [10.0, 0.01])
def test_lcm_is_the_formula(scaling):
    """f(x, t) = c_skip x + c_out x0, noised to the next timestep; at timestep 0 it is x itself."""
    _, levels = schedule("scaled_linear")
    timestep = [999, 500, 3, 0]
    table = lcm(make_grid(levels, timestep), timestep_scaling=scaling)
    x, m, z = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    root, coroot = levels[timestep].sqrt(), (1 - levels[timestep]).sqrt()
    x0, scaled = ((x - coroot * m) / root).clamp(-1, 1), scaling * torch.tensor(timestep).double()
    f = 0.25 / (scaled**2 + 0.25) * x + scaled / (scaled**2 + 0.25).sqrt() * x0
    after = torch.tensor([*levels[timestep[1:]].tolist(), 1.0], dtype=torch.float64)
    close(apply(table, x, m, z), after.sqrt() * f + (1 - after).sqrt() * z, rtol=1e-11, atol=1e-11)
    assert apply(table, x, m, z)[-1] == x[-1]
