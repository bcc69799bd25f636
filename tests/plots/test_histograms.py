"""plots.histogram_figure: the densities that it shows."""

import numpy as np
import pytest
import torch
from support.figure_contents import drawn, legend

from ddpm_ext.plots import histogram_figure

pytest.importorskip("matplotlib")


def shrinking_normals():
    """Samples at five timesteps, and the timesteps: normals whose spread shrinks and whose mean rises to 0.5"""
    z = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    spread = (1.0, 0.7, 0.4, 0.2, 0.1)
    return [s * z + (1 - s) * 0.5 for s in spread], [90, 70, 30, 10, 0]


def test_histogram_is_the_density():
    values, timesteps = shrinking_normals()
    figure = histogram_figure(values, timesteps, samples=torch.full((64, 16), 0.5), bins=20, limit=2)
    over_time, beside = figure.axes[:2]
    (mesh,) = over_time.collections
    density = mesh.get_array()
    assert density.shape == (20, 5)
    edges = torch.linspace(-2, 2, 21, dtype=torch.float64)
    for column, x_t in enumerate(values):
        inside = (x_t.flatten()[:, None] >= edges[:-1]) & (x_t.flatten()[:, None] < edges[1:])
        expected = inside.sum(0).numpy() / (1024 * 0.2)
        assert np.allclose(density[:, column].filled(0), expected)
        assert np.array_equal(density.mask[:, column], expected == 0)
    # each column reaches halfway to its neighbours
    assert mesh.get_coordinates()[0, :, 0].tolist() == [100, 80, 50, 20, 5, -5]
    assert np.allclose(mesh.get_coordinates()[:, 0, 1], edges) and over_time.get_xlim() == (100, -5)
    curves = drawn(beside)
    assert list(curves) == legend(beside) == ["t = 90", "samples", "N(0, 1)"]
    middles = (edges[1:] + edges[:-1]) / 2
    assert np.allclose(np.nan_to_num(np.array(curves["t = 90"])), np.stack([density[:, 0].filled(0), middles], 1))
    assert np.allclose(np.array(curves["N(0, 1)"])[:, 0], torch.distributions.Normal(0, 1).log_prob(middles).exp())
    at = [x for x, y in curves["samples"] if x == x]
    assert at == [pytest.approx(5)]  # all in one bin of 0.2


def test_histogram_takes_either_order_and_all_values():
    values, timesteps = shrinking_normals()
    down, up = histogram_figure(values, timesteps), histogram_figure(values[::-1], timesteps[::-1])
    meshes = [figure.axes[0].collections[0] for figure in (down, up)]
    assert np.ma.allequal(meshes[0].get_array(), meshes[1].get_array())
    assert down.axes[0].get_xlim() == up.axes[0].get_xlim()
    assert list(drawn(down.axes[1])) == ["t = 90", "t = 0", "N(0, 1)"]
    largest, limit = float(max(x_t.abs().max() for x_t in values)), meshes[0].get_coordinates()[-1, 0, 1]
    assert largest <= limit < largest + 1
    assert np.allclose(meshes[0].get_array().sum(axis=0) * 2 * limit / 80, 1)  # nothing is lost
    one = [histogram_figure([np.full(4, value)] * 2, [1, 0], limit=limit) for value, limit in ((0.0, None), (9.0, 1))]
    assert [figure.axes[0].collections[0].get_array().count() for figure in one] == [2, 0]


def test_histogram_bad_input():
    values, timesteps = shrinking_normals()
    for changed, message in (
        ({"timesteps": timesteps[:3]}, "timesteps: got 3 for 5 x_t"),
        ({"x_t": values[:1], "timesteps": [0]}, "expected as many, at least 2"),
        ({"timesteps": [9, 7, 7, 2, 1]}, "timesteps are not in order"),
        ({"x_t": [*values[:4], values[0] * torch.nan]}, r"x_t\[4\]: got values that are not"),
        ({"samples": torch.tensor([torch.inf])}, "samples: got values that are not finite"),
        ({"bins": 0}, "bins is 0"),
        ({"limit": float("nan")}, "limit is nan"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            histogram_figure(**{"x_t": values, "timesteps": timesteps} | changed)
