"""`ddpm-ext invert`: the noise that it finds leads back to the images."""

import numpy as np
import pytest
from support.command_line import call


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_noise_leads_back(tmp_path, monkeypatch, capsys, spacing):
    """The more steps, the closer; from other noise, another image."""
    monkeypatch.chdir(tmp_path)
    ddim = ("--spacing", spacing, "--quiet", "--steps")
    assert call("sample", "--num", 3, "--sampler", "ddim", *ddim, 10, "--out", "a.npz") == 0
    images, errors = np.load("a.npz")["arr_0"].astype(int), []
    for steps in (8, 40):
        assert call("invert", "a.npz", *ddim, steps, "--batch-size", 2) == 0
        noise = np.load("noise.npy")
        assert (noise.shape, noise.dtype) == ((3, 1, 8, 8), np.float32)
        assert "noise.npy: noise of 3 images, after " in capsys.readouterr().out
        back = ("--sampler", "ddim", "--no-clip", *ddim, steps, "--noise", "noise.npy", "--out", "b.npz")
        assert call("sample", *back) == 0
        errors.append(abs(np.load("b.npz")["arr_0"] - images).mean())
    assert errors[1] < errors[0] / 2 and errors[1] < 6
    np.save("noise.npy", noise[::-1])
    assert call("sample", *back) == 0 and abs(np.load("b.npz")["arr_0"] - images).mean() > 20


def test_batches_change_nothing(tmp_path, monkeypatch):
    """Each image keeps its class, which is that of its number."""
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), np.uint8)
    np.savez("a.npz", images)
    for size in (3, 2):
        given = ("--model", "shapes", "--steps", 3, "--quiet", "--batch-size", size)
        assert call("invert", "a.npz", *given, "--out", f"{size}.npy") == 0
    np.testing.assert_allclose(np.load("2.npy"), np.load("3.npy"), rtol=0, atol=1e-4)
