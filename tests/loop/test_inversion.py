"""The rows of the inversion, against the exact path of a Gaussian, and where they lead."""

import pytest
import torch

from ddpm_ext import GaussianDiffusion
from ddpm_ext.loop.inversion import inversion_table
from ddpm_ext.tables.spacing import spaced_timesteps

DEVIATION = 0.6  # of the data, a Gaussian of mean 0


def process(schedule="linear", prediction="eps"):
    return GaussianDiffusion(1000, schedule, prediction=prediction, backend="reference")


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


@pytest.mark.parametrize(("schedule", "prediction"), [("linear", "eps"), ("cosine", "v"), ("flow", "flow")])
def test_path_of_a_gaussian(schedule, prediction):
    """On the exact path, x / x_0 is the ratio of the deviations at the two levels; short steps come close to it."""
    gd = process(schedule, prediction)
    signal, noise = gd.schedule.signal, gd.schedule.noise
    deviation = (signal**2 * DEVIATION**2 + noise**2).sqrt()

    def model(x, t):
        i = t[0].long() if schedule != "flow" else (t[0] - 1).round().long()
        x0 = x * signal[i] * DEVIATION**2 / deviation[i] ** 2
        eps = (x - signal[i] * x0) / noise[i]
        return {"eps": eps, "v": signal[i] * eps - noise[i] * x0, "flow": eps - x0}[prediction]

    errors = []
    for steps in (50, 500):
        table = inversion_table(gd, steps)
        top = spaced_timesteps(1000, steps)[0]
        x = torch.full((1, 1, 2, 2), 0.3, dtype=torch.float64)
        given = {"record": "last", "progress": False, "clip_denoised": False, "dtype": torch.float64}
        end = gd.p_sample_loop(model, x.shape, sampler=table, noise=x, **given)
        errors.append(abs(end / x - deviation[top] / deviation[0]).max().item())
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 5


def test_refusals():
    with pytest.raises(ValueError, match="which begins at timestep 0, expected a later one"):
        inversion_table(process(), 1, "leading")
    with pytest.raises(ValueError, match="the mean of a step down"):
        inversion_table(process(prediction="x_prev"), 10)
    with pytest.raises(ValueError, match="expected 1 to 1000, the schedule's timesteps"):
        inversion_table(process(), 1001)
