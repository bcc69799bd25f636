"""Any loop over data that are known, by a model that knows them: all schedules, predictions, timesteps and samplers,
and guidance, by exact means and variances in float64."""

import numpy as np
import pytest
from support.any_loop import BY_TIMESTEP, any_loop, ends, true_level
from support.choices import for_many
from support.gaussian import calls_model, denoised, known_point, variance_of, weights

# How far means and variances may be, of samplers that change them for small errors: lcm's x0 keeps some of x, edm's
# noise is 1.003 times as large, and flow_sde's variance is right for short steps alone (tables/test_convergence.py).
INEXACT = {"lcm": (0.01, 0.02), "edm": (1e-9, 0.0061), "flow_sde": (1e-9, np.inf)}


@for_many(400)
def test_samples_of_a_point_are_that_point_with_the_rows_noise(choose):
    """Where x0 is the same for all samples, every step is exact, however long: after each row x is signal x0 + noise z.
    The mean that guidance leads to is u + scale (m - u), of CFG++ only where both are the same."""
    loop = any_loop(choose)
    other = 1.0 if loop.sampler.endswith("cfg_pp") else 0.3
    loop = loop._replace(scale=choose.one_of([1.0, 2.5, -0.5], "scale"), other=other)
    table, mean = loop.table(), other + loop.scale * (1 - other)
    if loop.begins_blind(table):
        return
    least, greatest = ends(loop.schedule)
    for row in filter(calls_model, table):
        ratio = row.noise_now / row.signal_now if row.signal_now else np.inf
        if loop.schedule in BY_TIMESTEP or least * (1 - 1e-9) <= ratio <= greatest * (1 + 1e-9):
            level = true_level(loop.schedule, row.timestep)
            assert (row.signal_now, row.noise_now) == pytest.approx(level, rel=1e-9, abs=1e-9)
    off, inflated = INEXACT.get(loop.sampler, (1e-9, 1e-9))
    start = table.signal_now[0].item(), table.noise_now[0].item()
    for row, x in zip(table, weights(table, *start, loop.model(known_point), mean, 0.0), strict=True):
        size = np.hypot(row.signal_after, row.noise_after)
        assert abs(x[0] - row.signal_after * mean) <= off * size
        assert abs(variance_of(x) - row.noise_after**2) <= inflated * size**2


@for_many(250)
def test_any_prediction_takes_the_same_samples(choose):
    """With guidance in an interval, and CFG++: by a model of normal data, the path is that of a model of x0."""
    loop = any_loop(choose, least=2)
    loop = loop._replace(scale=2.5, other=0.3, interval=choose.one_of([None, (0.0, 150.0), (100.0, 300.0)], "interval"))

    def best(row, x, mean):
        return denoised(row.signal_now, row.noise_now, x, mean)

    paths = []
    for each in (loop, loop._replace(prediction="x0")):
        table = each.table()
        if each.begins_blind(table):
            return
        start = table.signal_now[0].item(), table.noise_now[0].item()
        paths.append(np.array([*weights(table, *start, each.model(best))]))
    np.testing.assert_allclose(*paths, rtol=1e-7, atol=1e-7 * np.abs(paths[1]).max())
