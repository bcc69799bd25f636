"""`ddpm-ext bits-per-dim`: what it prints and writes is the bound of GaussianDiffusion."""

import numpy as np
import pytest
import torch
from support.command_line import TINY, call, save_tiny

from ddpm_ext import Philox, models
from ddpm_ext.models import Classes
from ddpm_ext.models.scheduler import DiffusionSettings

for module in ("diffusers", "safetensors", "tqdm"):
    pytest.importorskip(module)


def save_pets(folder):
    torch.manual_seed(1)
    unet = models.build_unet(TINY | {"num_class_embeds": 3})
    with torch.no_grad():
        unet.class_embedding.weight.mul_(5)
    models.save_model(unet, DiffusionSettings(timesteps=20), folder, classes=Classes(("cat", "dog"), 2))
    return folder


@pytest.mark.parametrize(("options", "labels"), [(None, None), ((), [2, 2, 2]), (("--class", "dog,cat"), [1, 0, 1])])
def test_bound(tmp_path, capsys, options, labels):
    """In batches of another size the same; an unconditional model, the null class, and given classes."""
    model = (save_tiny if options is None else save_pets)(tmp_path / "model")
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images)
    fixed = ("--model", model, "--num", 3, "--seed", 7, "--batch-size", 2, "--quiet", "--out", tmp_path / "bits.npz")
    assert call("bits-per-dim", tmp_path / "images.npz", *fixed, *(options or ())) == 0
    loaded = models.load_model(model)
    kwargs = {} if labels is None else {"class_labels": torch.tensor(labels)}
    expected = loaded.settings.diffusion().bits_per_dim(
        lambda x, t: loaded.unet(x, t, **kwargs),
        torch.from_numpy(images[:3]).permute(0, 3, 1, 2).float() / 127.5 - 1,
        rng=Philox(7),
    )
    with np.load(tmp_path / "bits.npz") as found:
        assert found.files == list(expected._fields)
        for name, values in expected._asdict().items():
            np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-6)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3 images: ")
    assert abs(float(lines[0].split()[2]) - expected.total.mean()) < 1e-3
    shares = [float(part.rpartition(" ")[2]) for part in lines[1].split(",")]
    assert abs(sum(shares) - expected.total.mean()) < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "required: DATA"),
        (("digits", "--out", "a.npy"), "out: got a.npy, expected a name that ends in .npz"),
        (("nowhere",), "data: got nowhere, expected a file or a folder that exists"),
        (("shapes",), "data: shapes are 3x8x8, expected 1x8x8, as digits has"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert call("bits-per-dim", *options) == 2
    written = capsys.readouterr()
    assert message in written.err
    assert (written.err.count("\n"), written.out) == (1, "")
