"""`ddpm-ext plot`: what each kind draws, and its messages for wrong input."""

import numpy as np
import pytest
import torch
from support.command_line import call, check_refused, grid_of
from support.figure_contents import drawn, legend, points, saved_figures

from ddpm_ext import GaussianDiffusion, Philox, StepTable, models, plots, randn
from ddpm_ext.tables.samplers import ddim, ddpm, euler
from ddpm_ext.tables.sigma_grids import karras_grid

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def saved(monkeypatch, tmp_path):
    """The figures that are written; the working folder is a new one."""
    monkeypatch.chdir(tmp_path)
    return saved_figures(monkeypatch)


def picture(path):
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


def test_schedules(saved, tmp_path, capsys):
    assert call("plot", "schedules", "sigmoid", "linear", "--timesteps", 50, "--out", "new/a.svg") == 0
    levels = {name: GaussianDiffusion(50, name).alphas_cumprod for name in ("sigmoid", "linear")}
    assert drawn(saved[0].axes[0]) == {name: points(range(50), values) for name, values in levels.items()}
    assert (tmp_path / "new" / "a.svg").read_text().startswith("<?xml")
    assert capsys.readouterr().out == "new/a.svg: sigmoid, linear, 50 timesteps\n"
    assert call("plot", "schedules") == 0
    assert {"linear", "cosine", "sigmoid", "scaled_linear"} <= set(legend(saved[1].axes[0]))
    assert picture("schedules.png").shape == (400, 900, 3)


def columns(figure):
    return {name: points for axes in figure.axes for name, points in drawn(axes).items()}


def test_one_table(saved, capsys):
    options = ("--steps", 10, "--spacing", "trailing", "--eta", 0.5, "--prediction", "v", "--beta-schedule", "cosine")
    assert call("plot", "table", "ddim", *options) == 0
    table = ddim(grid_of(10, "trailing", "cosine"), prediction="v", eta=0.5)
    found = columns(saved[0])
    assert list(found) == ["a", "b", "c0", "c1", "c2", "s", "timestep"]
    for name, values in found.items():
        assert values == points(range(10), getattr(table, name))
    assert capsys.readouterr().out == "table.png: ddim (10 rows)\n"
    assert call("plot", "table", "dpmpp_2m", "--steps", 6, "--spacing", "karras") == 0
    timestep = karras_grid(GaussianDiffusion(1000).alphas_cumprod, 6).timestep
    assert columns(saved[1])["timestep"] == points(range(6), timestep)
    assert np.abs(np.array(columns(saved[1])["c3"])[:, 1]).max() > 0.01


def test_tables_of_samplers_and_files(saved, tmp_path, capsys):
    mine = ddpm(grid_of(5, "leading"))
    mine.save("mine.json")
    options = ("--steps", 4, "--eta", 1, "--against", "timestep", "--out", "a.png")
    assert call("plot", "table", "mine.json", "ddim", "euler", *options) == 0
    found = drawn(saved[0].axes[0])
    grid = grid_of(4, "linspace")
    tables = {"mine.json": mine, "ddim": ddim(grid, eta=1.0), "euler": euler(grid)}
    assert found == {name: points(table.timestep, table.a) for name, table in tables.items()}
    noise = next(axes for axes in saved[0].axes if axes.get_title().startswith("s,"))
    assert drawn(noise) == {name: points(table.timestep, table.s) for name, table in tables.items()}  # eta is ddim's
    assert capsys.readouterr().out == "a.png: mine.json (5 rows), ddim (4 rows), euler (4 rows)\n"
    assert call("plot", "table", "mine.json", "--out", "b.png") == 0
    assert columns(saved[1])["c1"] == points(range(5), mine.c1)


def test_losses_of_a_run(saved, tmp_path, capsys):
    """Also of one that was killed while it wrote a line; without its options the title says less."""
    run = tmp_path / "run"
    run.mkdir()
    lines = ["step,loss,grad_norm,lr,images_per_second\n", "1,4,1,0.1,9\n", "2,3,1,0.1,9\n", "3,2.5,1,0"]
    (run / "losses.csv").write_text("".join(lines))
    assert call("plot", "losses", "run/losses.csv", "--out", "a.svg") == 0
    (run / "options.json").write_text('{"options": {"loss": "huber", "prediction": "v", "weighting": "min_snr"}}')
    assert call("plot", "losses", "run") == 0
    assert capsys.readouterr().out == "a.svg: losses of 2 steps\nlosses.png: losses of 2 steps\n"
    axes = saved[1].axes[0]
    assert drawn(axes)["each step"] == points([1, 2], [4, 3])
    assert axes.get_title() == "Training loss: huber of v, weighting min_snr"
    assert saved[0].axes[0].get_title() == "Loss of each training step"


def test_grid_of_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(256, size=(7, 4, 5, 3), dtype=np.uint8)
    np.savez("samples.npz", images)
    assert call("plot", "grid", "samples.npz") == 0
    assert np.array_equal(picture("grid.png"), plots.grid(images))
    assert call("plot", "grid", "samples.npz", "--num", 5, "--columns", 4, "--scale", 3, "--out", "b.png") == 0
    assert np.array_equal(picture("b.png"), plots.grid(images[:5], columns=4, scale=3))
    assert capsys.readouterr().out == "grid.png: 7 samples, 4x5x3\nb.png: 5 samples, 4x5x3\n"
    floats = np.linspace(-1.5, 1.5, 3 * 16).reshape(3, 1, 4, 4)  # as p_sample_loop gives them
    for dtype in (np.float16, np.float32, np.float64):
        np.save("floats.npy", floats.astype(dtype))
        assert call("plot", "grid", "floats.npy", "--out", "c.png") == 0
        assert np.array_equal(picture("c.png"), plots.grid(plots.to_uint8(floats.astype(dtype).astype(np.float32))))


def test_trajectory_is_that_of_its_own_command(tiny, tmp_path):
    options = ("--model", tiny, "--num", 2, "--every", 4, "--seed", 3, "--quiet", "--out")
    assert call("plot", "trajectory", *options, tmp_path / "a.png") == 0
    assert call("trajectory", *options, tmp_path / "b.png") == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def expected_curve(values, bins, limit):
    heights, edges = np.histogram(values.double().numpy(), bins, (-limit, limit))
    return heights / (values.numel() * 2 * limit / bins), (edges[1:] + edges[:-1]) / 2


def test_histogram_goes_from_the_starting_noise_to_the_samples(tiny, saved, capsys):
    options = ("--model", tiny, "--num", 4, "--seed", 5, "--sampler", "ddim", "--steps", 6, "--bins", 10, "--limit", 3)
    assert call("plot", "histogram", *options, "--quiet") == 0
    over_time, beside = saved[0].axes[:2]
    curves = drawn(beside)
    model = models.load_model(tiny)
    shape = (4, *model.shape)
    loop = {"sampler": "ddim", "steps": 6, "record": "last", "progress": False}
    with torch.no_grad():
        samples = model.settings.diffusion().p_sample_loop(model.unet, shape, rng=Philox(5), **loop)
    for label, values in (("t = 19", randn(shape, Philox(5), stream=1)), ("samples", samples)):
        density, middles = expected_curve(values, 10, 3)
        assert np.allclose(np.nan_to_num(np.array(curves[label])), np.stack([density, middles], 1))
    (mesh,) = over_time.collections
    assert mesh.get_array().shape == (10, 6)
    assert capsys.readouterr().out == "histogram.png: 4 samples at 6 of 6 steps\n"


def test_histogram_of_a_sampler_that_comes_twice_to_a_timestep(tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(plots, "histogram_figure", lambda x_t, timesteps, *_, **__: seen.append(timesteps))
    assert call("plot", "histogram", "--model", tiny, "--num", 2, "--sampler", "heun", "--steps", 5, "--quiet") == 0
    assert seen == [[19, 14, 10, 5, 0]]


BAD = [
    ((), "required: KIND"),
    (("spiral",), "invalid choice: 'spiral'"),
    (("schedules", "square"), "NAME: got square, expected linear, "),
    (("schedules", "--out", "a.gif"), "out: got a.gif, expected a name that ends in .png or .svg or .pdf"),
    (("table", "dpm"), "table: got dpm, expected ddpm, ddim"),
    (("table", "samples.json"), "samples.json is not JSON"),
    (("table", "mine.json", "--steps", "5"), "steps: got 5, but there is no sampler that it is for"),
    (("grid", "nowhere.npz"), "file: cannot read nowhere.npz: No such file"),
    (("grid", "samples.json"), "file: samples.json is no .npz or .npy of samples"),
    (("grid", "half.npz"), "file: half.npz is no .npz or .npy of samples"),
    (("grid", "named.npz"), "it holds x, y, expected arr_0"),
    (("grid", "flat.npy"), "file: flat.npy holds int64 of shape (3,), expected uint8 (num, height, width, channels)"),
    (("grid", "none.npy"), "images: got none"),
    (("grid", "none.npy", "--out", "a.svg"), "out: got a.svg, expected a name that ends in .png"),
    (("losses", "nowhere"), "run: nowhere has no losses, expected the folder of a run of ddpm-ext train"),
    (("losses", "."), "run: losses.csv has no losses"),
    (("histogram", "--out", "a.gif"), "out: got a.gif"),
    (("histogram", "--steps", "1", "--quiet", "--device", "cpu"), "steps: got 1, expected at least 2 for a histogram"),
    (("histogram", "--limit", "0"), "--limit: got 0, expected a number > 0"),
    (("trajectory", "--out", "a.npz"), "expected a name that ends in .png or .gif"),
]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "samples.json").write_text("no samples")
    np.savez(folder / "whole.npz", np.zeros((9, 8, 8, 1), np.uint8))
    (folder / "half.npz").write_bytes((folder / "whole.npz").read_bytes()[:300])
    np.savez(folder / "named.npz", x=1, y=2)
    np.save(folder / "flat.npy", np.arange(3))
    np.save(folder / "none.npy", np.zeros((0, 8, 8, 1), np.uint8))
    StepTable(timestep=[0], a=[1], b=[0], c0=[1], c1=[0]).save(folder / "mine.json")
    return folder


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_one_sentence(arguments, message, damaged, monkeypatch, capsys):
    monkeypatch.chdir(damaged)
    before = sorted(damaged.iterdir())
    check_refused(capsys, message, "plot", *arguments)
    assert sorted(damaged.iterdir()) == before
