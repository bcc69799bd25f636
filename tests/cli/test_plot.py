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
    assert capsys.readouterr().out == "new/a.svg: sigmoid, linear, 50 timesteps\n" and call("plot", "schedules") == 0
    assert {"linear", "cosine", "sigmoid", "scaled_linear"} <= set(legend(saved[1].axes[0]))
    assert picture("schedules.png").shape == (400, 900, 3)


def columns(figure):
    return {name: points for axes in figure.axes for name, points in drawn(axes).items()}


def test_one_table(saved, capsys):
    options = ("--steps", 10, "--spacing", "trailing", "--eta", 0.5, "--prediction", "v", "--beta-schedule", "cosine")
    assert call("plot", "table", "ddim", *options) == 0
    table, found = ddim(grid_of(10, "trailing", "cosine"), prediction="v", eta=0.5), columns(saved[0])
    assert list(found) == ["a", "b", "c0", "c1", "c2", "s", "timestep"]
    for name, values in found.items():
        assert values == points(range(10), getattr(table, name))
    assert capsys.readouterr().out == "table.png: ddim (10 rows)\n"
    assert call("plot", "table", "dpmpp_2m", "--steps", 6, "--spacing", "karras") == 0
    timestep = karras_grid(GaussianDiffusion(1000).alphas_cumprod, 6).timestep
    assert columns(saved[1])["timestep"] == points(range(6), timestep)
    assert np.abs(np.array(columns(saved[1])["h1"])[:, 1]).max() > 0.01


def test_tables_of_samplers_and_files(saved, capsys):
    mine = ddpm(grid_of(5, "leading"))
    mine.save("mine.json")
    options = ("--steps", 4, "--eta", 1, "--against", "timestep", "--out", "a.png")
    assert call("plot", "table", "mine.json", "ddim", "euler", *options) == 0
    found, grid = drawn(saved[0].axes[0]), grid_of(4)
    tables = {"mine.json": mine, "ddim": ddim(grid, eta=1.0), "euler": euler(grid)}
    assert found == {name: points(table.timestep, table.a) for name, table in tables.items()}
    noise = next(axes for axes in saved[0].axes if axes.get_title().startswith("s,"))
    assert drawn(noise) == {name: points(table.timestep, table.s) for name, table in tables.items()}  # eta is ddim's
    assert capsys.readouterr().out == "a.png: mine.json (5 rows), ddim (4 rows), euler (4 rows)\n"
    assert call("plot", "table", "mine.json", "--out", "b.png") == 0
    assert columns(saved[1])["c1"] == points(range(5), mine.c1)


def test_samplers_by_their_other_names(saved, tmp_path, capsys):
    """As --sampler takes them. What is a file or a folder is no name of a sampler."""
    assert call("plot", "table", "Euler a", "DDIM", "Euler Karras", "--steps", 4, "--out", "a.png") == 0
    assert capsys.readouterr().out == "a.png: euler_ancestral (4 rows), ddim (4 rows), euler karras (4 rows)\n"
    assert call("table", "--sampler", "k_euler", "--diff", "EulerDiscreteScheduler", "--steps", 4) == 0
    assert capsys.readouterr().out == "no difference\n"
    (tmp_path / "DDIM").mkdir()
    for folder in ("DDIM", "./DDIM"):
        check_refused(capsys, f"table: {folder} has no scheduler_config.json", "plot", "table", folder, "--steps", "4")


def test_losses_of_a_run(saved, tmp_path, capsys):
    """Also of one that was killed while it wrote a line; without its options the title says less."""
    run = tmp_path / "run"
    run.mkdir()
    header = "step,loss,grad_norm,lr,images_per_second,loss_q0,loss_q1,loss_q2,loss_q3\n"
    lines = [header, "1,4,1,0.1,9,nan,nan,nan,nan\n", "2,3,1,0.1,9,nan,nan,nan,nan\n", "3,2.5,1,0"]
    (run / "losses.csv").write_text("".join(lines))
    assert call("plot", "losses", "run/losses.csv", "--out", "a.svg") == 0
    (run / "options.json").write_text('{"options": {"loss": "huber", "prediction": "v", "weighting": "min_snr"}}')
    assert call("plot", "losses", "run") == 0
    assert capsys.readouterr().out == "a.svg: losses of 2 steps\nlosses.png: losses of 2 steps\n"
    axes = saved[1].axes[0]
    assert drawn(axes)["each step"] == points([1, 2], [4, 3])
    assert axes.get_title() == "Training loss: huber of v, weighting min_snr"


def test_grid_of_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(256, size=(7, 4, 5, 3), dtype=np.uint8)
    np.savez("samples.npz", images)
    assert call("plot", "grid", "samples.npz") == 0 and np.array_equal(picture("grid.png"), plots.grid(images))
    assert call("plot", "grid", "samples.npz", "--num", 5, "--columns", 4, "--scale", 3, "--out", "b.png") == 0
    assert np.array_equal(picture("b.png"), plots.grid(images[:5], columns=4, scale=3))
    assert capsys.readouterr().out == "grid.png: 7 samples, 4x5x3\nb.png: 5 samples, 4x5x3\n"
    floats = np.linspace(-1.5, 1.5, 3 * 16).reshape(3, 1, 4, 4)  # as p_sample_loop gives them
    for dtype in (np.float16, np.float32, np.float64):
        np.save("floats.npy", floats.astype(dtype))
        assert call("plot", "grid", "floats.npy", "--out", "c.png") == 0
        assert np.array_equal(picture("c.png"), plots.grid(plots.to_uint8(floats.astype(dtype).astype(np.float32))))


def test_histogram_goes_from_the_starting_noise_to_the_samples(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    seen, real = [], plots.histogram_figure
    monkeypatch.setattr(plots, "histogram_figure", lambda *of, **how: seen.append((of, how)) or real(*of, **how))
    options = ("--model", tiny, "--num", 4, "--seed", 5, "--sampler", "ddim", "--steps", 6, "--bins", 10, "--limit", 3)
    assert call("plot", "histogram", *options, "--quiet") == 0
    ((x_t, timesteps, *_), given) = seen[0]
    model = models.load_model(tiny)
    loop = {"sampler": "ddim", "steps": 6, "record": "last", "progress": False}
    with torch.no_grad():
        samples = model.settings.diffusion().p_sample_loop(model.unet, (4, *model.shape), rng=Philox(5), **loop)
    assert timesteps[0] == 19 and len(x_t) == 6 and (given["bins"], given["limit"]) == (10, 3)
    assert np.array_equal(x_t[0], randn(x_t[0].shape, Philox(5), stream=1)) and np.allclose(given["samples"], samples)
    assert capsys.readouterr().out == "histogram.png: 4 samples at 6 of 6 model calls\n"
    assert call("plot", "histogram", "--model", tiny, "--num", 2, "--sampler", "heun", "--steps", 5, "--quiet") == 0
    assert seen[1][0][1] == [19, 15, 11, 7, 3]  # the first visit of a sampler that comes twice to a timestep


def test_histogram_of_a_loop_that_jumps_back(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((8, 12, 3), 99, np.uint8)).save("known.png")
    Image.fromarray(np.eye(8, 12, dtype=np.uint8) * 255).save("mask.png")
    inpaint = ("--inpaint", "known.png", "--mask", "mask.png", "--jump-n-sample", 2, "--jump-length", 2)
    assert call("plot", "histogram", "--model", tiny, "--num", 2, "--steps", 6, *inpaint, "--quiet") == 0
    assert capsys.readouterr().out == "histogram.png: 2 samples at 6 of 10 model calls\n"


BAD = [
    ((), "required: KIND"),
    (("spiral",), "invalid choice: 'spiral'"),
    (("schedules", "square"), "NAME: got square, expected linear, "),
    (("schedules", "--out", "a.gif"), "out: got a.gif, expected a name that ends in .png or .svg or .pdf"),
    (("table", "dpm"), "table: got dpm, expected a name such as 'dpm_2', 'ddpm', "),
    (("table", "mine.json", "--steps", "5"), "steps: got 5, but there is no sampler that it is for"),
    (("grid", "nowhere.npz"), "file: cannot read nowhere.npz: No such file"),
    (("grid", "samples.json"), "file: samples.json is no .npz or .npy of samples"),
    (("grid", "named.npz"), "it holds x, y, expected arr_0"),
    (("grid", "flat.npy"), "file: flat.npy holds int64 of shape (3,), expected uint8 (num, height, width, channels)"),
    (("losses", "nowhere"), "run: nowhere has no losses, expected the folder of a run of ddpm-ext train"),
    (("histogram", "--steps", "1", "--quiet", "--device", "cpu"), "steps: got 1, expected at least 2 for a histogram"),
]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "samples.json").write_text("no samples")
    np.savez(folder / "named.npz", x=1, y=2)
    np.save(folder / "flat.npy", np.arange(3))
    StepTable(timestep=[0], a=[1], b=[0], c0=[1], c1=[0]).save(folder / "mine.json")
    return folder


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_one_sentence(arguments, message, damaged, monkeypatch, capsys):
    monkeypatch.chdir(damaged)
    before = sorted(damaged.iterdir())
    check_refused(capsys, message, "plot", *arguments)
    assert sorted(damaged.iterdir()) == before
