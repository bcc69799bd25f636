"""`ddpm-ext`: help, info, messages for wrong input, and interruption."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.command_line import ENVIRONMENT, call, run, save_tiny

from ddpm_ext import cli, version
from ddpm_ext.base import optional
from ddpm_ext.cli import sample
from ddpm_ext.training import TrainOptions

for module in ("diffusers", "safetensors", "sklearn", "tqdm", "PIL.Image"):
    pytest.importorskip(module)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def test_info():
    done = run("info")
    assert done.returncode == 0, done.stderr
    for word in ("torch", "cuda", "devices", "cpu", "threads"):
        assert word in done.stdout


def test_stdout_that_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert call("info") == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize(
    ("arguments", "unbuffered"), [("info", ""), ("info", "1"), ("--help", ""), ("sample --help", "1")]
)
def test_stdout_on_a_full_disk(arguments, unbuffered):
    """Printing fails, or the flush at the end; argparse says nothing of either."""
    command = [sys.executable, "-m", "ddpm_ext", *arguments.split()]
    environment = ENVIRONMENT | {"PYTHONUNBUFFERED": unbuffered}  # an empty one counts as none
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("ddpm-ext")
    assert done.stderr.endswith(": the output cannot be written: No space left on device\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="closes a pipe")
@pytest.mark.parametrize("gone", [("stdout",), ("stderr",), ("stdout", "stderr")], ids=" and ".join)
def test_work_goes_on_when_nobody_reads(tiny, tmp_path, gone):
    """Who reads the lines or the progress bar goes away, as `head` does: the file is written, and the code is 1."""
    command = [sys.executable, "-m", "ddpm_ext", "sample", "--model", str(tiny), "--num", "3", "--batch-size", "1"]
    command += ["--steps", "2", "--device", "cpu", "--out", str(tmp_path / "a.npz")]
    reads, writes = os.pipe()
    os.close(reads)
    environment = ENVIRONMENT | {"PYTHONUNBUFFERED": "1"}
    with open(tmp_path / "stdout", "w") as out, open(tmp_path / "stderr", "w") as err:
        streams = {"stdout": out, "stderr": err} | dict.fromkeys(gone, writes)
        assert subprocess.run(command, env=environment, timeout=300, **streams).returncode == 1
    os.close(writes)
    said = {name: (tmp_path / name).read_text() for name in ("stdout", "stderr")}
    assert all(bool(text) == (name not in gone) for name, text in said.items())
    assert not any(word in said["stderr"] for word in ("Traceback", "Exception", "rror"))
    assert "stdout" in gone or "a.npz: 3 samples" in said["stdout"]
    with np.load(tmp_path / "a.npz") as opened:
        assert len(opened["arr_0"]) == 3


def test_help_shows_groups_and_defaults(capsys):
    pages = {}
    commands = ("sample", "invert", "train", "bits-per-dim", "trajectory", "table", "plot", "info")
    for name in ("", *commands):
        assert call(*name.split(), "--help") == 0
        pages[name], errors = capsys.readouterr()
        assert errors == ""
    for word in commands:
        assert word in pages[""]
    for word in ("how to sample:", "(default: 64)", "guided-diffusion", "examples:", "torchrun", "--spacing"):
        assert word in pages["sample"]
    for word in ("--checkpoint-every", "--resume", "(default: 32,48,64)", "loss_second_moment", "learned_range"):
        assert word in pages["train"]


BAD = [
    (("sample", "--num", "0"), "--num: got 0, expected a whole number from 1 to 1000000000"),
    (("sample", "--num", "many"), "--num: got many"),
    (("sample", "--steps", "0"), "--steps: got 0"),
    (("sample", "--steps", "1001"), "steps is 1001, expected 1 to 1000, the schedule's timesteps"),
    (("sample", "--spacing", "even"), "spacing is 'even', expected 'linspace', 'leading'"),
    (("sample", "--spacing", "karras"), "steps is None, expected a number of steps for spacing 'karras'"),
    (("sample", "--spacing", "ddim7", "--steps", "7"), "steps is 7 beside spacing 'ddim7'"),
    (("sample", "--num-images", "0"), "--num-images: got 0, expected a whole number from 1 to 1000000000"),
    (
        ("sample", "--spacing", "karras", "--steps", "2000000000"),
        "--steps: got 2000000000, expected a whole number from",
    ),
    (
        ("table", "--sampler", "ddpm", "--timesteps", "2000000000"),
        "--timesteps: got 2000000000, expected a whole number",
    ),
    (("sample", "--guidance", "2"), "but digits has no classes, expected a class-conditional model, such as shapes"),
    (("sample", "--num-images", "4", "--num", "4"), "not allowed with argument"),
    (("sample", "--num-images", "4", "--out", "a.npz"), "out: got a.npz, expected a folder for --num-images"),
    (("sample", "--num-images", "4", "--npz", "a.npy"), "npz: got a.npy, expected a name that ends in .npz"),
    (("sample", "--num-images", "4", "--shard-size", "0"), "--shard-size: got 0"),
    (("sample", "--num-images", "4", "--steps", "1001"), "steps is 1001, expected 1 to 1000"),
    (("sample", "--npz"), "npz: belongs to --num-images"),
    (("sample", "--png"), "png: belongs to --num-images"),
    (("sample", "--eta", "-1"), "--eta: got -1, expected a number >= 0"),
    (("sample", "--eta", "nan", "--sampler", "ddim"), "--eta: got nan"),
    (("sample", "--eta", "1"), "eta: got 1.0, but it belongs to ddim"),
    (("sample", "--seed", "-1"), "--seed: got -1, expected a whole number from 0 to 18446744073709551615"),
    (("sample", "--batch-size", "0"), "--batch-size: got 0"),
    (("sample", "--sampler", "dpm"), "invalid choice: 'dpm'"),
    (("sample", "--sampler", "euler", "--eta", "1"), "belongs to ddim or euler_ancestral"),
    (("sample", "--device", "abacus"), "device: abacus can't be used here"),
    (("sample", "--device", "gpu"), "device: got gpu, expected cuda for a GPU, or cpu"),
    (("sample", "--device", "GPU:1"), "device: got GPU:1, expected cuda:1 for a GPU, or cpu"),
    (("sample", "--device", "cuda:77"), "device: cuda:77 can't be used here"),
    (("sample", "--dtype", "int8"), "invalid choice: 'int8'"),
    (("sample", "--model", "nowhere"), "model: no such folder: nowhere"),
    (("sample", "--out", "samples.jpg"), "out: got samples.jpg, expected a name that ends in .npz or .png"),
    (("sample", "--colour", "red"), "sample: unrecognized arguments: --colour red (see ddpm-ext sample --help)"),
    (
        ("plot", "grid", "a.npz", "--colour"),
        "plot grid: unrecognized arguments: --colour (see ddpm-ext plot grid --help)",
    ),
    (("trajectory", "--out", "a.npz"), "expected a name that ends in .png or .gif"),
    (("trajectory", "--every", "0"), "--every: got 0"),
    (("train", "--steps", "1"), "required: --out"),
    (("train", "--out", "run", "--lr", "0"), "--lr: got 0, expected a number > 0"),
    (("train", "--out", "run", "--ema", "1"), "--ema: got 1, expected in [0, 1)"),
    (("train", "--out", "run", "--widths", "a,b"), "--widths: got a,b"),
    (("train", "--out", "run", "--flip"), "flip: digits are not to be mirrored"),
    (("train", "--out", "run", "--data", "nowhere", "--image-size", "8"), "data: no such folder: nowhere"),
    (("train", "--out", "run", "--data", "nowhere"), "data: no such folder: nowhere; expected one"),
    (("train", "--out", "run", "--timesteps", "2000000000"), "--timesteps: got 2000000000, expected a whole number"),
    (("train", "--out", "run", "--image-size", "16"), "digits are 8 by 8"),
    (("train", "--out", "run", "--autocast", "half"), "--autocast: invalid choice: 'half'"),
    (("train", "--out", "run", "--timestep-sampler", "all"), "--timestep-sampler: invalid choice: 'all'"),
    (("train", "--out", "run", "--accumulate", "129"), "accumulate: got 129, expected at most the batch size, 128"),
    (("train", "--out", "run", "--clip", "-1"), "--clip: got -1, expected a number >= 0"),
    (("train", "--out", "run", "--sample-every", "-1"), "--sample-every: got -1"),
    (("train", "--out", "run", "--model-config", "none.json"), "model: no such file: none.json"),
    (("train", "--out", "run", "--data", ".", "--image-size", "8"), "data: no images in ., expected files ending in"),
    (("paint",), "invalid choice: 'paint'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    written = capsys.readouterr()
    assert message in written.err
    assert (written.err.count("\n"), written.out) == (1, "")
    assert not list(tmp_path.iterdir())


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
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "diffusers", None)
        assert call("sample", "--model", tiny, "--num", 1, "--out", tmp_path / "a.npz") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "needs diffusers: pip install diffusers, or " in message
    assert message.endswith('pip install --no-build-isolation ".[demo]"\n')


def test_package_that_lacks_one_of_its_own_names_both(tiny, tmp_path, monkeypatch, capsys):
    """diffusers is there, but not what it imports: the same pip command installs that."""
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "__init__.py").write_text("import no_such_package.inner\n")
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "diffusers")
        patch.syspath_prepend(tmp_path)
        assert call("sample", "--model", tiny, "--num", 1, "--out", tmp_path / "a.npz") == 2
    message = capsys.readouterr().err
    assert "needs diffusers, which needs no_such_package, which is not installed: pip install diffusers, or" in message
    assert message.count("\n") == 1


def test_without_matplotlib_a_table_is_not_printed_and_then_refused(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    files = ("--save", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    assert call("table", "--sampler", "ddim", "--steps", 3, *files) == 2
    written = capsys.readouterr()
    assert written.out == "" and "needs matplotlib: pip install matplotlib" in written.err
    assert not list(tmp_path.iterdir())


def test_without_tqdm_there_is_no_bar_and_one_line_says_so(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(optional, "_told", False)
    for name in ("tqdm", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, name, None)
    many = ("--num-images", 3, "--out", tmp_path / "many")
    for out in (("--num", 3, "--batch-size", 1, "--out", tmp_path / "a.npz"), many):
        assert call("sample", "--model", tiny, *out, "--steps", 2) == 0
    said = capsys.readouterr()
    assert said.err == "no progress bar without tqdm: pip install tqdm\n"
    assert "sample 1 of 3\n" in said.out


def test_a_warning_is_one_line(tiny, tmp_path):
    command = ("sample", "--model", tiny, "--num", 1, "--steps", 2, "--quiet", "--graph", "--device", "cpu")
    done = run(*command, "--out", tmp_path / "a.npz")
    assert done.returncode == 0
    assert done.stderr.startswith(
        "ddpm-ext sample: graph: steps are not captured in a CUDA graph (the samples are on cpu"
    )
    assert done.stderr.count("\n") == 1


def test_one_sample_is_counted_in_the_singular(tiny, tmp_path, capsys):
    out = tmp_path / "a.npz"
    assert call("sample", "--model", tiny, "--num", 1, "--steps", 1, "--quiet", "--out", out) == 0
    assert capsys.readouterr().out == f"{out}: 1 sample, 8x12x3\n"


def test_bare_command_prints_help(capsys):
    assert cli.main([]) == 0
    bare = capsys.readouterr()
    assert call("--help") == 0
    assert bare == capsys.readouterr()


@pytest.mark.parametrize("gpu", [False, True])
def test_default_device_is_a_gpu_that_this_build_can_use(monkeypatch, gpu):
    taken = []
    monkeypatch.setattr(sample, "run", lambda options: taken.append(options.device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for cuda in (None, "13.0"):
        monkeypatch.setattr(version, "C", SimpleNamespace(build_info=lambda cuda=cuda: {"cuda": cuda}))
        assert cli.main(["sample"]) == 0
        assert cli.main(["sample", "--device", "cpu"]) == 0
        assert TrainOptions().device == taken[-2]
    assert taken == ["cpu", "cpu", "cuda" if gpu else "cpu", "cpu"]


def test_exit_code_of_a_command_that_ends_itself(monkeypatch):
    """As training does after a SIGTERM."""

    def stop(options):
        raise SystemExit(143)

    monkeypatch.setattr(sample, "run", stop)
    assert cli.main(["sample"]) == 143


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c(tiny, tmp_path):
    # So many that it takes minutes: it must not be over before it is interrupted.
    command = [sys.executable, "-m", "ddpm_ext", "sample", "--num", "2000", "--out", str(tmp_path / "a.npz")]
    # A shell's background jobs ignore the signal, and what a process ignores its children ignore, too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        running = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, before)
    seen = b""
    while b"/1000" not in seen and running.poll() is None:
        seen += os.read(running.stderr.fileno(), 4096)  # until the progress bar shows that sampling has started
    running.send_signal(signal.SIGINT)
    rest = running.communicate(timeout=300)[1]
    assert running.returncode == 130
    assert b"ddpm-ext sample: interrupted" in rest
    assert b"Traceback" not in rest
    assert not list(tmp_path.iterdir())
