"""`ddpm-ext`: the files that its commands write, and its messages for wrong input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from support.command_line import ENVIRONMENT, TINY, call, run, save_tiny

from ddpm_ext import models
from ddpm_ext.models.folder import CONFIG, WEIGHTS
from ddpm_ext.models.scheduler import DiffusionSettings

for module in ("diffusers", "safetensors", "sklearn", "tqdm"):
    pytest.importorskip(module)
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def test_sample_writes_guided_diffusions_npz(tiny, tmp_path, device):
    options = ("--num", 5, "--batch-size", 2, "--device", device, "--out", "new/samples.npz")
    done = run("sample", "--model", tiny, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "new/samples.npz: 5 samples, 8x12x3" in done.stdout
    assert "it/s" in done.stderr  # the progress bar
    with np.load(tmp_path / "new" / "samples.npz") as opened:
        assert opened.files == ["arr_0"]
        assert (opened["arr_0"].shape, opened["arr_0"].dtype) == ((5, 8, 12, 3), np.uint8)
        assert opened["arr_0"].std() > 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["samples.npz"]


def test_samples_do_not_depend_on_the_batch_size(tiny, tmp_path):
    found = []
    for batch in (1, 3, 64):
        assert (
            call("sample", "--model", tiny, "--num", 4, "--batch-size", batch, "--out", tmp_path / "a.npz", "--quiet")
            == 0
        )
        found.append(np.load(tmp_path / "a.npz")["arr_0"].astype(int))
    # The noise has the same bits; the model's sums may be rounded differently in a batch of another size.
    assert abs(found[0] - found[1]).max() <= 1
    assert abs(found[0] - found[2]).max() <= 1
    assert len(np.unique(found[0].reshape(4, -1), axis=0)) == 4


def test_seed_and_sampler_decide(tiny, tmp_path):
    def drawn(*more):
        assert call("sample", "--model", tiny, "--num", 2, "--out", tmp_path / "a.npz", "--quiet", *more) == 0
        return np.load(tmp_path / "a.npz")["arr_0"].astype(int)

    first = drawn()
    assert np.array_equal(drawn("--seed", 0), first)
    ddim = ("--sampler", "ddim", "--steps", 4)
    others = [("--seed", 1), ("--steps", 7), ddim, (*ddim, "--eta", 1.0), (*ddim, "--spacing", "trailing")]
    for other in (*others, ("--spacing", "3,4")):
        assert abs(drawn(*other) - first).max() > 5
    assert abs(drawn("--backend", "reference") - first).max() <= 1
    assert abs(drawn("--dtype", "bfloat16") - first).mean() < 10


@pytest.mark.parametrize("spacing", ["linspace", "karras"])
def test_png_is_a_visible_grid(tmp_path, spacing):
    fast = ("--sampler", "ddim", "--steps", 5, "--spacing", spacing)
    assert call("sample", "--num", 4, *fast, "--out", tmp_path / "a.png", "--quiet") == 0
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.format == "PNG"
        assert min(opened.size) > 120  # two by two of eight pixels a side, enlarged


@pytest.mark.parametrize("ending", [".png", ".gif"])
def test_trajectory(tiny, tmp_path, ending, device):
    out = tmp_path / f"a{ending}"
    assert (
        call("trajectory", "--model", tiny, "--num", 2, "--every", 5, "--device", device, "--out", out, "--quiet") == 0
    )
    with Image.open(out) as opened:
        assert getattr(opened, "n_frames", 1) == (1 if ending == ".png" else 5)  # t = 19, 14, 9, 4 and 0
        assert np.asarray(opened.convert("L")).std() > 1


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        (("--spacing", "ddim5"), 5),
        (("--spacing", "2,4", "--every", 4), 3),
        (("--sampler", "heun", "--steps", 3), 4),
    ],
)
def test_trajectory_ends_with_the_last_step(tiny, tmp_path, options, frames):
    """The last step is shown: of 5 rows, of 6, and of Heun's, which are two a step and one for the last step."""
    out = tmp_path / "a.gif"
    assert call("trajectory", "--model", tiny, "--num", 1, *options, "--out", out, "--quiet") == 0
    with Image.open(out) as opened:
        assert opened.n_frames == frames


def test_trajectory_between_timesteps(tmp_path):
    out = tmp_path / "a.gif"
    options = ("--spacing", "karras", "--steps", 4, "--num", 1, "--out", out, "--quiet")
    assert call("trajectory", "--model", "digits", *options) == 0
    with Image.open(out) as opened:
        assert opened.n_frames == 4


def test_trajectory_is_that_of_the_samples(tmp_path, device):
    """The predicted x_0 of the last step is the sample, for every kind of prediction."""
    from ddpm_ext import Philox
    from ddpm_ext.plots.recorder import Recorder

    unet = models.build_unet(TINY | {"sample_size": 8}).to(device).eval()
    options = {"record": "last", "progress": False, "device": device}
    for prediction in ("eps", "x0", "v"):
        diffusion = DiffusionSettings(timesteps=20, prediction=prediction).diffusion()
        recorder = Recorder(unet, 6, 20, 2)
        with torch.no_grad():
            drawn = [
                diffusion.p_sample_loop(unet, (3, 3, 8, 8), rng=Philox(1), **options),
                diffusion.p_sample_loop(
                    recorder, (3, 3, 8, 8), rng=Philox(1), x0=True, callback=recorder.keep, **options
                ),
            ]
        assert torch.equal(*drawn)
        assert recorder.labels() == ["t = 19", "t = 13", "t = 7", "t = 1", "t = 0"]
        assert [images.shape for images in recorder.x_t + recorder.x_0] == [(2, 3, 8, 8)] * 10
        assert np.allclose(recorder.x_0[-1], drawn[0][:2].cpu(), atol=1e-5)


def test_info():
    done = run("info")
    assert done.returncode == 0, done.stderr
    for word in ("torch", "cuda", "devices", "cpu", "threads"):
        assert word in done.stdout


def test_help_shows_groups_and_defaults(capsys):
    pages = {}
    for name in ("", "sample", "train", "trajectory", "plot", "info"):
        assert call(*name.split(), "--help") == 0
        pages[name], errors = capsys.readouterr()
        assert errors == ""
    for word in ("sample", "train", "trajectory", "plot", "info"):
        assert word in pages[""]
    for word in ("how to sample:", "(default: 64)", "guided-diffusion", "examples:", "torchrun", "--spacing"):
        assert word in pages["sample"]
    for word in ("--checkpoint-every", "--resume", "(default: 32,48,64)", "loss_second_moment", "learned_range"):
        assert word in pages["train"]


BAD = [
    (("sample", "--num", "0"), "--num: got 0, expected a whole number of at least 1"),
    (("sample", "--num", "many"), "--num: got many"),
    (("sample", "--steps", "0"), "--steps: got 0"),
    (("sample", "--steps", "1001"), "steps is 1001, expected 1 <= steps < 1001, there being 1000 timesteps"),
    (("sample", "--spacing", "even"), "spacing is 'even', expected 'linspace', 'leading'"),
    (("sample", "--spacing", "karras"), "steps is None, expected a number of steps for spacing 'karras'"),
    (("sample", "--spacing", "ddim7", "--steps", "7"), "steps is 7 beside spacing 'ddim7'"),
    (("sample", "--num-images", "0"), "--num-images: got 0, expected a whole number of at least 1"),
    (("sample", "--num-images", "4", "--num", "4"), "not allowed with argument"),
    (("sample", "--num-images", "4", "--out", "a.npz"), "out: got a.npz, expected a folder for --num-images"),
    (("sample", "--num-images", "4", "--npz", "a.npy"), "npz: got a.npy, expected a name that ends in .npz"),
    (("sample", "--num-images", "4", "--shard-size", "0"), "--shard-size: got 0"),
    (("sample", "--num-images", "4", "--steps", "1001"), "steps is 1001, expected 1 <= steps"),
    (("sample", "--npz"), "npz: belongs to --num-images"),
    (("sample", "--png"), "png: belongs to --num-images"),
    (("sample", "--eta", "-1"), "--eta: got -1, expected a number >= 0"),
    (("sample", "--eta", "nan", "--sampler", "ddim"), "--eta: got nan"),
    (("sample", "--eta", "1"), "eta: got 1.0, but it belongs to ddim"),
    (("sample", "--seed", "-1"), "--seed: got -1, expected a whole number in [0, 18446744073709551615]"),
    (("sample", "--batch-size", "0"), "--batch-size: got 0"),
    (("sample", "--sampler", "plms"), "invalid choice: 'plms'"),
    (("sample", "--sampler", "euler", "--eta", "1"), "belongs to ddim or euler_ancestral"),
    (("sample", "--device", "abacus"), "device: abacus can't be used here"),
    (("sample", "--device", "cuda:77"), "device: cuda:77 can't be used here"),
    (("sample", "--dtype", "int8"), "invalid choice: 'int8'"),
    (("sample", "--model", "nowhere"), "model: no such folder: nowhere"),
    (("sample", "--out", "samples.jpg"), "out: got samples.jpg, expected a name that ends in .npz or .png"),
    (("sample", "--colour", "red"), "unrecognized arguments: --colour red"),
    (("trajectory", "--out", "a.npz"), "expected a name that ends in .png or .gif"),
    (("trajectory", "--every", "0"), "--every: got 0"),
    (("train", "--steps", "1"), "required: --out"),
    (("train", "--out", "run", "--lr", "0"), "--lr: got 0, expected a number > 0"),
    (("train", "--out", "run", "--ema", "1"), "--ema: got 1, expected in [0, 1)"),
    (("train", "--out", "run", "--widths", "a,b"), "--widths: got a,b"),
    (("train", "--out", "run", "--flip"), "flip: digits are not to be mirrored"),
    (("train", "--out", "run", "--data", "nowhere", "--image-size", "8"), "data: no such folder: nowhere"),
    (("train", "--out", "run", "--image-size", "16"), "digits are 8 by 8"),
    (("train", "--out", "run", "--autocast", "half"), "--autocast: invalid choice: 'half'"),
    (("train", "--out", "run", "--timestep-sampler", "all"), "--timestep-sampler: invalid choice: 'all'"),
    (("train", "--out", "run", "--accumulate", "129"), "accumulate: got 129, expected at most the batch size, 128"),
    (("train", "--out", "run", "--clip", "-1"), "--clip: got -1, expected a number >= 0"),
    (("train", "--out", "run", "--sample-every", "-1"), "--sample-every: got -1"),
    (("train", "--out", "run", "--model-config", "none.json"), "model: no such file: none.json"),
    (("train", "--out", "run", "--data", ".", "--image-size", "8"), "data: no images in ., expected files ending in"),
    (("paint",), "invalid choice: 'paint'"),
    ((), "required: COMMAND"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    written = capsys.readouterr()
    assert message in written.err
    assert (written.err.count("\n"), written.out) == (1, "")
    assert not list(tmp_path.iterdir())


def damaged(folder, kind):
    """Makes a model's folder unusable in one of several ways."""
    weights = folder / WEIGHTS
    if kind == "cut short":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif kind == "another architecture":
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | {"block_out_channels": [16, 16]}))
    elif kind == "no such file":
        weights.unlink()
    elif kind == "pickled":
        weights.rename(folder / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize("kind", ["cut short", "another architecture", "no such file", "pickled"])
def test_damaged_model_overwrites_nothing(tiny, tmp_path, kind):
    shutil.copytree(tiny, tmp_path / "model")
    damaged(tmp_path / "model", kind)
    (tmp_path / "samples.npz").write_bytes(b"precious")
    done = run("sample", "--model", "model", "--num", 1, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert kind in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "samples.npz").read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "samples.npz"]


def test_unwritable_out_is_reported_before_the_work(tiny, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder.npz").mkdir()
    for out in ("file/a.npz", "folder.npz"):
        assert call("sample", "--model", tiny, "--num", 1, "--out", tmp_path / out) == 2
    assert call("train", "--steps", 1, "--out", tmp_path / "file") == 2
    written = capsys.readouterr()
    assert (written.err.count("\n"), written.err.count(": out: ")) == (3, 3)
    assert (tmp_path / "file").read_bytes() == b""


def test_missing_extra_names_the_command(tiny, tmp_path, monkeypatch, capsys):
    for name in ("diffusers", "tqdm"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            assert call("sample", "--model", tiny, "--num", 1, "--out", tmp_path / "a.npz") == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert f'needs {name}: pip install "ddpm-ext[demo]"' in message


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c(tiny, tmp_path):
    command = [sys.executable, "-m", "ddpm_ext", "sample", "--num", "64", "--out", str(tmp_path / "a.npz")]

    def accept_sigint() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and so do their children

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = subprocess.Popen(command, env=ENVIRONMENT, preexec_fn=accept_sigint, **pipes)
    seen = b""
    deadline = time.monotonic() + 120
    while b"/1000" not in seen and time.monotonic() < deadline and running.poll() is None:
        seen += os.read(running.stderr.fileno(), 4096)  # until the progress bar shows that sampling has started
    running.send_signal(signal.SIGINT)
    rest = running.communicate(timeout=60)[1]
    assert running.returncode == 130
    assert b"ddpm-ext sample: interrupted" in rest
    assert b"Traceback" not in rest
    assert not list(tmp_path.iterdir())
