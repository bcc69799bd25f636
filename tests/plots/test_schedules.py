"""plots.schedule_figure: what its axes show."""

import numpy as np
import pytest
import torch
from support.figure_contents import drawn, legend, points

from ddpm_ext import GaussianDiffusion
from ddpm_ext.plots import schedule_figure

pytest.importorskip("matplotlib")


def test_schedules_are_drawn_with_their_ratio():
    levels = {name: GaussianDiffusion(100, name).alphas_cumprod for name in ("linear", "cosine", "sigmoid")}
    power, ratio = schedule_figure(levels).axes
    assert drawn(power) == {name: points(range(100), values) for name, values in levels.items()}
    for name, values in levels.items():
        signal, noise = values.sqrt(), (1 - values).sqrt()
        assert np.allclose(np.array(drawn(ratio)[name])[:, 1], (signal / noise) ** 2, rtol=1e-12)
    assert (power.get_yscale(), ratio.get_yscale()) == ("linear", "log") and legend(power) == list(levels)
    assert power.get_xlabel() == ratio.get_xlabel() == "timestep t"


def test_schedules_of_several_lengths_share_an_axis():
    figure = schedule_figure({"short": np.array([0.9, 0.1]), "long": np.array([0.9, 0.5, 0.2, 0.1])})
    assert drawn(figure.axes[0]) == {
        "short": [[0, 0.9], [0.5, 0.1]],
        "long": [[0, 0.9], [0.25, 0.5], [0.5, 0.2], [0.75, 0.1]],
    }
    assert {axes.get_xlabel() for axes in figure.axes} == {"t / timesteps"}


def test_ends_of_a_schedule_have_no_place_on_the_logarithmic_axis():
    levels = torch.tensor([1.0, 0.5, 0.0])
    power, ratio = schedule_figure({"all": levels}).axes
    assert drawn(power)["all"] == [[0, 1], [1, 0.5], [2, 0]]
    found = np.array(drawn(ratio)["all"])[:, 1]
    assert found[1] == 1 and np.isnan(found[[0, 2]]).all()
    assert levels.tolist() == [1, 0.5, 0]  # as they were


def test_schedules_bad_input(tmp_path):
    for schedules, message in (
        ({}, "schedules: got none"),
        ({"a": torch.zeros(2, 2)}, r"schedules\['a'\] has shape \(2, 2\)"),
        ({"a": torch.tensor([0.5, 1.1])}, r"schedules\['a'\] has values outside \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            schedule_figure(schedules, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
