"""ddpm_ext.plots: uint8 conversion, grids, strips, GIFs, the curve of losses, a StepTable's columns."""

import sys

import numpy as np
import pytest
import torch

from ddpm_ext import StepTable, plots
from ddpm_ext.extras import MissingExtra

Image = pytest.importorskip("PIL.Image")


def test_to_uint8_is_guided_diffusions():
    values = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 0.999, 1.0, 9.0]).view(1, 2, 2, 2)
    expected = ((values + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    found = plots.to_uint8(values)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected.numpy())
    assert np.array_equal(plots.to_uint8(values.numpy()), found)
    assert plots.to_uint8(torch.full((1, 1, 1, 1), torch.nan)).item() == 0
    assert plots.to_uint8(torch.ones(2, 3, 4, 5, dtype=torch.bfloat16, requires_grad=True)).shape == (2, 4, 5, 3)


def test_to_uint8_bad_input():
    for bad in (torch.zeros(1, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.int64)):
        with pytest.raises(ValueError, match="images: got"):
            plots.to_uint8(bad)


def test_grid_places_rows_and_enlarges():
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * 10
    picture = plots.grid(images, columns=3, scale=2)
    gap = plots._GAP
    assert picture.shape == (2 * (2 + gap) + gap, 3 * (2 + gap) + gap, 3)
    for index in range(5):
        top, left = gap + index // 3 * (2 + gap), gap + index % 3 * (2 + gap)
        assert (picture[top : top + 2, left : left + 2] == index * 10).all()
    assert (picture[-gap - 1, -gap - 1] == plots._BETWEEN).all()  # the place that stays empty


def test_small_images_become_visible():
    assert min(plots.grid(np.zeros((1, 8, 8, 1), np.uint8)).shape[:2]) > 60
    assert plots.grid(np.zeros((1, 100, 100, 3), np.uint8)).shape[0] == 100 + 2 * plots._GAP


def test_grid_bad_input():
    with pytest.raises(ValueError, match="got none"):
        plots.grid(np.zeros((0, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match="got 4 channels"):
        plots.grid(np.zeros((1, 8, 8, 4), np.uint8))


def test_grid_is_written_as_png(tmp_path):
    plots.save_grid(torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.format == "PNG"
        assert np.array_equal(
            np.asarray(opened), plots.grid(plots.to_uint8(torch.linspace(-1, 1, 256).view(4, 1, 8, 8)))
        )


def test_strips_have_a_row_a_sample_and_labels(tmp_path):
    moments = [torch.full((3, 1, 8, 8), value) for value in (-1.0, 0.0, 1.0, -1.0)]
    picture = plots.strips([plots.to_uint8(moment) for moment in moments], ["a", "b", "c", "d"], "title", scale=4)
    body = plots.grid(np.zeros((12, 8, 8, 1), np.uint8), columns=4, scale=4)
    assert picture.shape[1] == body.shape[1]
    head = picture.shape[0] - body.shape[0]
    assert (picture[:head] < 100).any()  # ink
    middle = picture[head + body.shape[0] // 2, plots._GAP + 2 :: 32 + plots._GAP, 0]
    assert middle[:4].tolist() == [0, 127, 255, 0]
    plots.save_strips(moments, ["a", "b", "c", "d"], "title", tmp_path / "a.png", scale=4)
    with Image.open(tmp_path / "a.png") as opened:
        assert np.array_equal(np.asarray(opened), picture)
    with pytest.raises(ValueError, match="labels: got 1 for 4 moments"):
        plots.strips([plots.to_uint8(moment) for moment in moments], ["a"], "title")


def test_gif(tmp_path):
    frames = [np.full((20, 30, 3), value, np.uint8) for value in (0, 100, 200)]
    plots.save_gif(frames, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as opened:
        assert (opened.format, opened.n_frames, opened.size) == ("GIF", 3, (30, 20))
    with pytest.raises(ValueError, match="frames: got none"):
        plots.save_gif([], tmp_path / "a.gif")


def test_loss_curve(tmp_path):
    pytest.importorskip("matplotlib")
    for losses in ([0.5], [1 / step for step in range(1, 400)]):
        plots.save_loss_curve(losses, tmp_path / "losses.png")
        with Image.open(tmp_path / "losses.png") as opened:
            assert opened.size == (840, 480)
    with pytest.raises(ValueError, match="losses: got none"):
        plots.save_loss_curve([], tmp_path / "losses.png")


def test_failed_picture_keeps_the_old_one(tmp_path):
    (tmp_path / "a.png").write_bytes(b"old")
    with pytest.raises((TypeError, ValueError)):
        plots.save_picture(np.zeros((2, 2, 7), np.uint8), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


STEPS = {"timestep": [9, 5, 0], "a": [200, 3, 1], "b": [-200, -2, 0], "c0": [0.1, 0.5, 1], "c1": [0.9, 0.5, 0]}


def test_step_table_draws_every_column():
    pytest.importorskip("matplotlib")
    table = StepTable(**STEPS, c2=[0, -0.5, 0], s=[0.5, 0.25, 0])
    figure = table.plot()
    drawn = {}
    for axes in figure.axes:
        assert axes.get_title() and axes.get_ylabel()
        lines = {line.get_label(): line for line in axes.lines}
        drawn |= {name: line.get_xydata().tolist() for name, line in lines.items()}
        assert len({(line.get_color(), line.get_linestyle()) for line in lines.values()}) == len(lines)
        if len(lines) > 1:
            assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)
        assert axes.get_yscale() == ("asinh" if "a" in lines else "linear")
    columns = {name: getattr(table, name).tolist() for name in ("timestep", "a", "b", "c0", "c1", "c2", "s")}
    assert drawn == {name: [[i, value] for i, value in enumerate(values)] for name, values in columns.items()}
    assert [axes.get_xlabel() for axes in figure.axes[2:]] == ["step of the loop"] * 2


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_step_table_picture(rows, tmp_path):
    pytest.importorskip("matplotlib")
    table = StepTable(**{name: values[0:1] * rows for name, values in STEPS.items()}, draw=range(rows))
    figure = table.plot(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.size == (1080, 672)
        ink = set(map(tuple, np.asarray(opened.convert("RGB")).reshape(-1, 3).tolist()))
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)} <= ink
    marked = {line.get_marker() for axes in figure.axes for line in axes.lines}
    assert marked == ({"."} if rows < 1000 else {""})
    with pytest.raises(ValueError, match="is a folder"):
        table.plot(tmp_path)
    assert [found.name for found in tmp_path.iterdir()] == ["a.png"]


def test_step_table_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match="drawing a StepTable needs matplotlib: pip install"):
        StepTable(**STEPS).plot()
