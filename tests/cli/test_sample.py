"""`ddpm-ext sample --num`: the file that it writes, and what the samples depend on."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from support.command_line import ENVIRONMENT, call, check_refused, not_finite, save_tiny

from ddpm_ext.models.folder import WEIGHTS

Image = pytest.importorskip("PIL.Image")


@pytest.mark.slow
def test_compiled_model_draws_the_same_and_the_process_ends(tmp_path, monkeypatch):
    """Also where torch finds the compiled code of an earlier run; its workers for compiling leave no error behind."""
    monkeypatch.setitem(ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    one_block = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    model = save_tiny(tmp_path / "model", **one_block)  # less to compile
    command = ("sample", "--model", model, "--num", 2, "--steps", 2, "--quiet", "--out", tmp_path / "a.npz")
    assert call(*command) == 0
    found = [np.load(tmp_path / "a.npz")["arr_0"].astype(int)]
    for _ in range(2):
        compiled = [sys.executable, "-m", "ddpm_ext", *map(str, command), "--device", "cpu", "--compile"]
        done = subprocess.run(compiled, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr
        assert not [word for word in ("Traceback", "rror", "Exception ignored") if word in done.stderr]
        found.append(np.load(tmp_path / "a.npz")["arr_0"].astype(int))
    assert abs(found[1] - found[0]).max() <= 1 and np.array_equal(found[1], found[2]) and (tmp_path / "cache").is_dir()


def test_damaged_model_overwrites_nothing(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples.npz").write_bytes(b"precious")
    weights = shutil.copytree(tiny, tmp_path / "model") / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:5000])
    check_refused(capsys, "cut short", "sample", "--model", "model", "--num", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "samples.npz"}
    assert (tmp_path / "samples.npz").read_bytes() == b"precious"


@pytest.mark.parametrize("command", ["sample", "trajectory"])
def test_samples_that_are_not_finite_are_an_error(tiny, tmp_path, capsys, command):
    """They are written, since others of them may be good, but the command does not succeed."""
    out = tmp_path / "a.png"
    options = ("--model", not_finite(tiny, tmp_path / "model"), "--num", 3, "--steps", 2, "--out", out, "--quiet")
    assert call(command, *options) == 2
    assert "out: 3 of 3 samples are not finite, and black in " in capsys.readouterr().err and out.exists()
