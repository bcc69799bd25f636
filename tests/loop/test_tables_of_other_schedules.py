"""A step table in a diffusion that it was not made for: a warning that names the row, or a refusal, and no silence."""

from dataclasses import replace

import pytest
import torch
from support.refused import refused

from ddpm_ext import GaussianDiffusion, Philox
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import make_loop_rows
from ddpm_ext.tables.schedules import SCHEDULES

LOOP = {"rng": Philox(0), "record": "last", "progress": False}


def table_of(gd, sampler="unipc"):
    return make_loop_rows(gd, LoopOptions(sampler=sampler, steps=6)).table


def sample(gd, table):
    return gd.p_sample_loop(lambda x, t: 0.5 * x, (2, 1, 4, 4), sampler=table, **LOOP)


@pytest.mark.parametrize(
    "made, taken, row",
    [
        (GaussianDiffusion(1000), GaussianDiffusion(1000, "cosine"), 1),  # both begin with hardly any signal
        (GaussianDiffusion(500), GaussianDiffusion(1000), 0),
        (GaussianDiffusion(1000), GaussianDiffusion(1000, "flow", prediction="flow"), 1),
    ],
)
def test_a_table_of_another_schedule_warns_of_the_row(made, taken, row):
    with pytest.warns(UserWarning, match=rf"the table's row {row}, .* was made for another schedule"):
        sample(taken, table_of(made))


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("sampler", ["ddim", "unipc", "heun", "restart", "euler_ancestral"])
@pytest.mark.filterwarnings("error")
def test_a_table_of_the_same_schedule_says_nothing(schedule, sampler):
    prediction = "flow" if schedule == "flow" else "eps"
    gd, again = (GaussianDiffusion(1000, schedule, prediction=prediction) for _ in range(2))
    table = table_of(gd, sampler)
    assert torch.equal(sample(again, table), sample(gd, table))


@pytest.mark.parametrize("row, timestep, shown", [(2, 5000, "5000"), (2, -1, "-1"), (0, 1e30, "1e.30")])
def test_timesteps_that_the_schedule_lacks_are_refused(row, timestep, shown):
    gd = GaussianDiffusion(1000)
    table = table_of(gd)
    wrong = table.timestep.double() if isinstance(timestep, float) else table.timestep.clone()
    wrong[row] = timestep
    message = f"the table's row {row} has timestep {shown}, expected 0 to 999"
    refused(ValueError, message, sample, gd, replace(table, timestep=wrong))
    of_flow = table_of(GaussianDiffusion(1000, "flow", prediction="flow"))
    refused(ValueError, "row 0 has timestep 1000, expected 0 to 999", sample, gd, of_flow)


def test_timesteps_in_another_order_are_told_by_their_levels():
    gd = GaussianDiffusion(1000)
    table = table_of(gd)
    with pytest.warns(UserWarning, match="row 0, "):
        sample(gd, replace(table, timestep=table.timestep.flip(0)))
