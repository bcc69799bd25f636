"""The loss by quarter of the timesteps: in losses.csv, in the line of the log, in TensorBoard's events, in the plot."""

import math

import numpy as np
import pytest
import torch
from support import trainer_run
from support.figure_contents import drawn, legend, points, saved_figures
from support.trainer_run import make

from ddpm_ext.plots import save_loss_curve
from ddpm_ext.training.log import QUARTERS, read_losses, read_quarters
from ddpm_ext.training.step import TrainingStep

TIMESTEPS = 22  # which four does not divide


def watch(monkeypatch):
    """The timesteps and losses of the steps that are taken, by the step."""
    seen, log_rows = {}, TrainingStep.log_rows

    def keep(self, newest):
        for step in self._pending:
            seen[step.step + 1] = (step.t.clone(), step.losses.clone())
        return log_rows(self, newest)

    monkeypatch.setattr(TrainingStep, "log_rows", keep)
    return seen


def expected_means(t, losses):
    """As guided-diffusion's log_loss_dict has them: int(4 * t / timesteps) is the quarter."""
    found = {quarter: [] for quarter in range(4)}
    for own_t, loss in zip(t.tolist(), losses.tolist(), strict=True):
        found[int(4 * own_t / TIMESTEPS)].append(loss)
    return [np.mean(values) if values else math.nan for values in found.values()]


@pytest.mark.parametrize("sampler", ["uniform", "loss_second_moment"])
def test_log_has_the_losses_of_each_quarter(tmp_path, monkeypatch, sampler):
    seen, lines = watch(monkeypatch), []
    options = {"steps": 15, "timesteps": TIMESTEPS, "accumulate": 2, "timestep_sampler": sampler}
    make(tmp_path / "run", report=lines.append, **options).fit()
    found = trainer_run.rows(tmp_path / "run")
    assert len(found) == len(seen) == 15
    for row in found:
        t, losses = seen[row["step"]]
        np.testing.assert_allclose([row[name] for name in QUARTERS], expected_means(t, losses), rtol=1e-5)
        assert row["loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert any(math.isnan(value) for own in read_quarters(tmp_path / "run" / "losses.csv") for value in own)
    # A line is of all samples since the last one.
    first = next(line for line in lines if line.startswith("step "))
    t, losses = (torch.cat([seen[step][part] for step in range(1, 8)]) for part in (0, 1))
    assert " (" + " ".join(f"{mean:.4f}" for mean in expected_means(t, losses)) + ") " in first


def test_a_line_that_was_cut_short_is_no_line(tmp_path):
    path = tmp_path / "run" / "losses.csv"
    make(tmp_path / "run", steps=10).fit()
    losses, quarters = read_losses(path), read_quarters(path)
    assert losses == pytest.approx([row["loss"] for row in trainer_run.rows(path.parent)]) and len(losses) == 10
    path.write_text(path.read_text()[:-2])
    assert read_losses(path) == losses[:9] and np.array_equal(read_quarters(path), quarters[:9], equal_nan=True)


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_curve_shows_them(tmp_path, monkeypatch):
    made = saved_figures(monkeypatch)
    losses, generator = [1 / step for step in range(1, 301)], np.random.default_rng(0)
    quarters = generator.uniform(0.1, 1, (300, 4))
    quarters[generator.uniform(size=(300, 4)) < 0.4] = np.nan
    quarters[:, 3] = np.nan
    save_loss_curve(losses, tmp_path / "losses.png", quarters=quarters)
    lines = drawn(made[0].axes[0])
    assert made[0].axes[0].get_title() == "Loss of each training step"
    names = ["each step", "mean of 3 steps", "first quarter of the timesteps", "second quarter", "third quarter"]
    assert legend(made[0].axes[0]) == list(lines) == names and lines["each step"] == points(range(1, 301), losses)
    assert np.allclose(lines["mean of 3 steps"], points(range(3, 301), np.convolve(losses, [1 / 3] * 3, "valid")))
    for number, name in enumerate(names[2:]):
        means, found = [np.nanmean(quarters[i : i + 3, number]) for i in range(298)], np.array(lines[name])
        assert np.allclose(found[:, 1], means, equal_nan=True) and np.array_equal(found[:, 0], np.arange(3, 301))
    with pytest.raises(ValueError, match=r"quarters: got shape \(299, 4\), expected \(300, 4\), four for each loss"):
        save_loss_curve(losses, tmp_path / "losses.png", quarters=quarters[1:])
    save_loss_curve(losses[:199], tmp_path / "losses.png")
    assert legend(made[1].axes[0]) == ["each step"]  # the mean of one step would lie on it
    with pytest.raises(ValueError, match="losses: got none"):
        save_loss_curve([], tmp_path / "losses.png")
