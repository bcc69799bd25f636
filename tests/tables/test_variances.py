"""ddpm's variances and a classifier's gradient in the rows of the samplers; loop/test_options.py has ddpm's."""

from dataclasses import replace

import pytest
import torch
from support.any_loop import of_a_model
from support.gaussian import push, take
from support.grids import IDS, grids, schedule

from ddpm_ext.tables.grid import grid_of_levels, make_grid
from ddpm_ext.tables.levels import flow
from ddpm_ext.tables.predictions import SPACED_PREDICTIONS
from ddpm_ext.tables.samplers import SAMPLERS, ddim, ddim_inverse, ddpm

LEARNED = ("learned", "learned_range", "learned_variance")
LEVELS = torch.tensor([0.9, 0.55, 0.3, 0.02, 0.0], dtype=torch.float64)
FLOW = grid_of_levels(torch.arange(4, 0, -1), 1 - LEVELS, LEVELS, scale=flow)
FLOW = replace(FLOW, schedule=FLOW.alphas_cumprod.flip(0))


def random(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).numpy()


def test_rows_of_learned_variances_have_their_columns():
    betas, levels = schedule(timesteps=50)
    grid = make_grid(levels, range(49, -1, -1), betas=betas)
    fixed = ddpm(grid)
    for variance in LEARNED:
        table = ddpm(grid, variance=variance)
        assert table.plain == (variance == "learned_variance")  # the rows of other samplers do not have l0 and l1
        assert table.s.tolist() == [1.0] * 49 + [0.0]
        assert table.g1.tolist() == [1.0] * 50
        assert fixed.diff(table).columns.keys() <= {"s", "l0", "l1", "g1"}
    assert fixed.plain


def test_the_variance_of_a_single_step_is_beta():
    """There is no step before, whose variance the last one takes."""
    betas, levels = schedule("cosine", 1)
    large, ranged = (ddpm(make_grid(levels, [0], betas=betas), variance=v) for v in ("fixed_large", "learned_range"))
    assert torch.equal(large.g1, betas)
    torch.testing.assert_close((2 * ranged.l0).exp(), betas, rtol=1e-14, atol=0)
    assert ranged.l1.tolist() == [0.0]


def score_tables(grid, prediction):
    for name in SAMPLERS:
        table = SAMPLERS[name](grid, prediction=prediction)
        if table.cu.any():  # the eps by which CFG++ renoises has no gradient
            assert table.g0.any() and not table.g1.any()
        elif name != "ddpm":
            yield table
    yield ddim(grid, prediction=prediction, eta=0.6)
    yield ddim(grid, prediction=prediction, eta=1.0, keep_eps=False)


@pytest.mark.parametrize("prediction", SPACED_PREDICTIONS)
@pytest.mark.parametrize("grid", [*grids(), FLOW, "up"], ids=[*IDS, "flow", "up"])
def test_gradient_is_another_eps(grid, prediction):
    """eps - sqrt(1 - a_t) g replaces eps, also for other predictions, and in what rows keep: Dhariwal & Nichol 2021,
    algorithm 2. Samples of another scale have the inverse scale's gradient."""
    if grid == "up":
        _, levels = schedule("scaled_linear")
        up = make_grid(levels, [0, 200, 400, 700], final=levels[999].item())
        tables = [ddim_inverse(up, prediction=prediction, keep_eps=keep) for keep in (False, True)]
    else:
        tables = [*score_tables(grid, prediction)]
    for table in tables:
        x, m, h1, h2, h3, z, g = random(7, len(table), 3, seed=1)
        for i, row in enumerate(table):
            of_x0, of_eps = of_a_model("linear", prediction, row)
            shift = of_x0 * row.noise_now**2 / row.signal_now - of_eps * row.noise_now
            history, other = [h1[i], h2[i], h3[i]], m[i] + shift * g[i]
            guided = take(row, x[i], m[i], z[i], g=g[i], history=history)
            expected = take(row, x[i], other, z[i], history=history)
            kept = [push(row, [], x0, x[i], m) for (x0, _), m in ((guided, m[i]), (expected, other))]
            for here, there in zip((*guided, *kept[0]), (*expected, *kept[1]), strict=True):
                assert here == pytest.approx(there, rel=1e-9, abs=1e-9)
