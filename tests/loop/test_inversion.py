"""The rows of the inversion, against the path of a point, and where they lead."""

import pytest
import torch
from support import any_loop
from support.gaussian import known_point, variance_of, weights

from ddpm_ext import GaussianDiffusion
from ddpm_ext.loop.inversion import inversion_table
from ddpm_ext.tables.predictions import SPACED_PREDICTIONS
from ddpm_ext.tables.spacing import spaced_timesteps


def process(prediction="eps"):
    return GaussianDiffusion(1000, prediction=prediction, backend="reference")


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading", "karras"])
def test_rows_go_up_through_the_levels_of_the_loop(spacing):
    gd = process()
    table = inversion_table(gd, 10, spacing)
    assert (table.signal_after[:-1] == table.signal_now[1:]).all()
    assert table.signal_now[0] == gd.alphas_cumprod[0].sqrt()
    if spacing != "karras":
        down = spaced_timesteps(1000, 10, spacing).flip(0)
        rising = torch.unique(torch.cat([torch.tensor([0]), down]))
        assert table.timestep.tolist() == rising[:-1].tolist()
        assert table.signal_after[-1] == gd.alphas_cumprod[rising[-1]].sqrt()


@pytest.mark.parametrize("prediction", SPACED_PREDICTIONS)
@pytest.mark.parametrize("spacing", [None, "leading", "karras"])
def test_where_a_point_goes(spacing, prediction):
    """From clean data with the first level's noise, by a model that knows the point, every step is exact."""
    for schedule in ("linear", "cosine", "edm", "levels"):
        table = inversion_table(any_loop.process(schedule, prediction), 7, spacing)
        model = any_loop.AnyLoop(schedule, prediction, "ddim", {}).model(known_point)
        start = [levels[0] for levels in any_loop.nodes(schedule)]
        for row, x in zip(table, weights(table, *start, model, sigma=0.0), strict=True):
            assert x[0] == pytest.approx(row.signal_after, rel=1e-9)
            assert variance_of(x) == pytest.approx(row.noise_after**2, rel=1e-9)


def test_refusals():
    with pytest.raises(ValueError, match="which begins at timestep 0, expected a later one"):
        inversion_table(process(), 1, "leading")
    with pytest.raises(ValueError, match="the mean of a step down"):
        inversion_table(process(prediction="x_prev"), 10)
    with pytest.raises(ValueError, match="expected 1 to 1000, the schedule's timesteps"):
        inversion_table(process(), 1001)
