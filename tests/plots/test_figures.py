"""ddpm_ext.figures: what is in the axes of schedules, histograms and losses; what all figures have in common."""

import sys

import numpy as np
import pytest
import torch
from support.figure_contents import drawn, legend, looks, points

from ddpm_ext import GaussianDiffusion, StepTable, plots
from ddpm_ext.base.optional import MissingExtra
from ddpm_ext.plots import figures
from ddpm_ext.plots import step_tables as table_figures

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

STEPS = {"timestep": [9, 5, 0], "a": [200, 3, 1], "b": [-200, -2, 0], "c0": [0.1, 0.5, 1], "c1": [0.9, 0.5, 0]}


def test_plots_offers_every_figure():
    for module in (figures, table_figures):
        assert set(module.__all__) <= set(plots.__all__)
        assert all(getattr(plots, name) is getattr(module, name) for name in module.__all__)


# ------------------------------------------------------------------------------------------------------ schedules


def test_schedules_are_drawn_with_their_ratio():
    levels = {name: GaussianDiffusion(100, name).alphas_cumprod for name in ("linear", "cosine", "sigmoid")}
    power, ratio = figures.schedule_figure(levels).axes
    assert drawn(power) == {name: points(range(100), values) for name, values in levels.items()}
    for name, values in levels.items():
        signal, noise = values.sqrt(), (1 - values).sqrt()
        found = np.array(drawn(ratio)[name])[:, 1]
        assert np.allclose(found, (signal / noise) ** 2, rtol=1e-12)
    assert (power.get_yscale(), ratio.get_yscale()) == ("linear", "log")
    assert legend(power) == list(levels)
    assert power.get_xlabel() == ratio.get_xlabel() == "timestep t"
    assert "alphas_cumprod" in power.get_ylabel() and "powers" in ratio.get_ylabel()


def test_schedules_of_several_lengths_share_an_axis():
    levels = {"short": np.array([0.9, 0.1]), "long": np.array([0.9, 0.5, 0.2, 0.1])}
    figure = figures.schedule_figure(levels)
    assert drawn(figure.axes[0]) == {
        "short": [[0, 0.9], [0.5, 0.1]],
        "long": [[0, 0.9], [0.25, 0.5], [0.5, 0.2], [0.75, 0.1]],
    }
    assert {axes.get_xlabel() for axes in figure.axes} == {"t / timesteps"}


def test_ends_of_a_schedule_have_no_place_on_the_logarithmic_axis(tmp_path):
    levels = torch.tensor([1.0, 0.5, 0.0])
    power, ratio = figures.schedule_figure({"all": levels}, tmp_path / "a.png").axes
    assert drawn(power)["all"] == [[0, 1], [1, 0.5], [2, 0]]
    found = np.array(drawn(ratio)["all"])[:, 1]
    assert found[1] == 1 and np.isnan(found[[0, 2]]).all()
    assert levels.tolist() == [1, 0.5, 0]  # as they were


def test_schedules_bad_input(tmp_path):
    for schedules, message in (
        ({}, "schedules: got none"),
        ({"a": torch.zeros(2, 2)}, r"schedules\['a'\] has shape \(2, 2\)"),
        ({"a": torch.zeros(0)}, r"schedules\['a'\] has shape \(0,\)"),
        ({"a": torch.tensor([0.5, 1.1])}, r"schedules\['a'\] leaves \[0, 1\]"),
        ({"a": torch.tensor([0.5, torch.nan])}, r"schedules\['a'\] leaves \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            figures.schedule_figure(schedules, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_fifteen_lines_look_different():
    levels = {str(i): torch.full((40,), i / 20) for i in range(1, 16)}
    found = looks(figures.schedule_figure(levels).axes[0])
    assert len({(color, str(dashes)) for color, _, dashes in found}) == 15
    assert len({color for color, _, _ in found[:7]}) == len({str(dashes) for _, _, dashes in found[:7]}) == 7


# ------------------------------------------------------------------------------------------------------ histogram


def moments():
    """Normals that shrink towards 0.5 over five timesteps"""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(64, 1, 4, 4, generator=generator)
    spread = (1.0, 0.7, 0.4, 0.2, 0.1)
    return [s * z + (1 - s) * 0.5 for s in spread], [90, 70, 30, 10, 0]


def test_histogram_is_the_density():
    values, timesteps = moments()
    samples = torch.full((64, 16), 0.5)
    figure = figures.histogram_figure(values, timesteps, samples=samples, bins=20, limit=2)
    over_time, beside = figure.axes[:2]
    (mesh,) = over_time.collections
    density = mesh.get_array()
    assert density.shape == (20, 5)
    edges = torch.linspace(-2, 2, 21, dtype=torch.float64)
    for column, moment in enumerate(values):
        inside = (moment.flatten()[:, None] >= edges[:-1]) & (moment.flatten()[:, None] < edges[1:])
        expected = inside.sum(0).numpy() / (1024 * 0.2)
        assert np.allclose(density[:, column].filled(0), expected)
        assert np.array_equal(density.mask[:, column], expected == 0)
    # each moment reaches halfway to its neighbours
    assert mesh.get_coordinates()[0, :, 0].tolist() == [100, 80, 50, 20, 5, -5]
    assert np.allclose(mesh.get_coordinates()[:, 0, 1], edges)
    left, right = over_time.get_xlim()
    assert (left, right) == (100, -5)
    assert over_time.get_xlabel() == "timestep t" and over_time.get_ylabel()
    curves = drawn(beside)
    assert list(curves) == legend(beside) == ["t = 90", "samples", "N(0, 1)"]
    middles = (edges[1:] + edges[:-1]) / 2
    assert np.allclose(np.nan_to_num(np.array(curves["t = 90"])), np.stack([density[:, 0].filled(0), middles], 1))
    normal = np.array(curves["N(0, 1)"])
    assert np.allclose(normal[:, 0], torch.distributions.Normal(0, 1).log_prob(middles).exp())
    at = [x for x, y in curves["samples"] if x == x]
    assert at == [pytest.approx(5)]  # all in one bin of 0.2
    assert beside.get_xscale() == "log"
    assert "density" in figure.axes[2].get_ylabel()


def test_histogram_takes_either_order_and_all_values():
    values, timesteps = moments()
    down = figures.histogram_figure(values, timesteps)
    up = figures.histogram_figure(values[::-1], timesteps[::-1])
    meshes = [figure.axes[0].collections[0] for figure in (down, up)]
    assert np.ma.allequal(meshes[0].get_array(), meshes[1].get_array())
    assert down.axes[0].get_xlim() == up.axes[0].get_xlim()
    assert list(drawn(down.axes[1])) == ["t = 90", "t = 0", "N(0, 1)"]
    largest = float(max(moment.abs().max() for moment in values))
    limit = meshes[0].get_coordinates()[-1, 0, 1]
    assert largest <= limit < largest + 1
    assert np.allclose(meshes[0].get_array().sum(axis=0) * 2 * limit / 80, 1)  # nothing is lost


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_histogram_of_one_value(value, tmp_path):
    figure = figures.histogram_figure([np.full(4, value)] * 2, [1, 0], tmp_path / "a.png")
    assert figure.axes[0].collections[0].get_array().count() == 2
    outside = figures.histogram_figure([np.full(4, 9.0)] * 2, [1, 0], tmp_path / "a.png", limit=1)
    assert outside.axes[0].collections[0].get_array().count() == 0


def test_histogram_bad_input():
    values, timesteps = moments()
    for changed, kind, message in (
        ({"timesteps": timesteps[:3]}, ValueError, "timesteps: got 3 for 5 moments"),
        ({"moments": values[:1], "timesteps": [0]}, ValueError, "expected as many, at least 2"),
        ({"timesteps": [9, 7, 8, 2, 1]}, ValueError, "timesteps are not in order"),
        ({"timesteps": [9, 7, 7, 2, 1]}, ValueError, "timesteps are not in order"),
        ({"moments": [*values[:4], values[0] * torch.nan]}, ValueError, r"moments\[4\]: got values that are not"),
        ({"moments": [*values[:4], values[0][:0]]}, ValueError, r"moments\[4\]: got none"),
        ({"samples": torch.tensor([torch.inf])}, ValueError, "samples: got values that are not finite"),
        ({"bins": 0}, ValueError, "bins is 0"),
        ({"bins": 2.5}, TypeError, "bins is 2.5"),
        ({"limit": 0}, ValueError, "limit is 0"),
        ({"limit": float("nan")}, ValueError, "limit is nan"),
    ):
        with pytest.raises(kind, match=message):
            figures.histogram_figure(**{"moments": values, "timesteps": timesteps} | changed)


# ------------------------------------------------------------------------------------------------ losses and files


def test_loss_curve(tmp_path):
    for losses in ([0.5], [1 / step for step in range(1, 400)]):
        figures.save_loss_curve(losses, tmp_path / "losses.png")
        with Image.open(tmp_path / "losses.png") as opened:
            assert opened.size == (700, 400)
    with pytest.raises(ValueError, match="losses: got none"):
        figures.save_loss_curve([], tmp_path / "losses.png")


def test_loss_curve_has_losses_and_their_mean(tmp_path, monkeypatch):
    import matplotlib.figure

    made = []
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda figure, path, **_: (made.append(figure), path.write_bytes(b""))
    )
    losses = [1 / step for step in range(1, 301)]
    figures.save_loss_curve(losses, tmp_path / "losses.png")
    found = drawn(made[0].axes[0])
    assert found["each step"] == points(range(1, 301), losses)
    means = [sum(losses[i : i + 3]) / 3 for i in range(298)]
    assert np.allclose(found["mean of 3 steps"], points(range(3, 301), means))


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_same_input_same_bytes(ending, tmp_path):
    table = StepTable(**STEPS)
    for name in ("a", "b"):
        table.plot(tmp_path / (name + ending))
    first = (tmp_path / f"a{ending}").read_bytes()
    assert first == (tmp_path / f"b{ending}").read_bytes()
    assert len(first) > 5000
    assert b"Software" not in first and b"CreationDate" not in first and b"<dc:date>" not in first


def test_no_state_is_left():
    import matplotlib

    before = dict(matplotlib.rcParams)
    pyplot = sys.modules.get("matplotlib.pyplot")
    StepTable(**STEPS).plot()
    assert dict(matplotlib.rcParams) == before
    assert sys.modules.get("matplotlib.pyplot") is pyplot


def test_failed_figure_writes_nothing(tmp_path):
    (tmp_path / "a.xyz").write_bytes(b"old")
    with pytest.raises(ValueError, match="xyz"):
        StepTable(**STEPS).plot(tmp_path / "a.xyz")
    assert (tmp_path / "a.xyz").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    table = StepTable(**STEPS)
    values, timesteps = moments()
    for draw, purpose in (
        (table.plot, "drawing a StepTable"),
        (lambda: plots.step_table_figure({"a": table}), "drawing step tables"),
        (lambda: figures.schedule_figure({"a": torch.ones(3)}), "drawing schedules"),
        (lambda: figures.histogram_figure(values, timesteps), "drawing a histogram"),
    ):
        with pytest.raises(MissingExtra, match=f"{purpose} needs matplotlib: pip install"):
            draw()
