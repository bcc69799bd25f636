"""`ddpm-ext bits-per-dim`: what it prints and writes is the bound of GaussianDiffusion."""

import inspect
import re
import shutil

import numpy as np
import pytest
import torch
from support.command_line import call, check_refused

from ddpm_ext import GaussianDiffusion, Philox, models
from ddpm_ext.losses.likelihood import BitsPerDim


@pytest.mark.parametrize(("options", "labels"), [(None, None), ((), [3, 3, 3]), (("--class", "dog,cat"), [1, 0, 1])])
def test_bound(tiny, pets, tmp_path, capsys, options, labels):
    """In batches of another size the same; an unconditional model, the null class, and given classes."""
    model = tiny if options is None else pets
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images)
    fixed = ("--model", model, "--num", 3, "--seed", 7, "--batch-size", 2, "--quiet", "--out", tmp_path / "bits.npz")
    assert call("bits-per-dim", tmp_path / "images.npz", *fixed, *(options or ())) == 0
    loaded = models.load_model(model)
    kwargs = {} if labels is None else {"class_labels": torch.tensor(labels)}
    x_start, gd = torch.from_numpy(images[:3]).permute(0, 3, 1, 2).float() / 127.5 - 1, loaded.settings.diffusion()
    expected = gd.bits_per_dim(lambda x, t: loaded.unet(x, t, **kwargs), x_start, rng=Philox(7))
    with np.load(tmp_path / "bits.npz") as found:
        assert found.files == list(expected._fields)
        for name, values in expected._asdict().items():
            np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-6)
    lines = capsys.readouterr().out.splitlines()
    whose = {None: "", (): " without classes"}.get(options, " of class dog,cat")
    assert lines[0].startswith(f"3 images{whose}: ")
    mean, error = re.fullmatch(r".*: (\S+) bits per dimension \+- (\S+) \(standard error\)", lines[0]).groups()
    assert abs(float(mean) - expected.total.mean()) < 1e-3
    assert float(error) == pytest.approx(expected.total.std().item() / 3**0.5, rel=1e-2, abs=1e-4)
    assert abs(sum([float(part.rpartition(" ")[2]) for part in lines[1].split(",")]) - expected.total.mean()) < 1e-3


@pytest.fixture
def asked(monkeypatch):
    """The classes that the model is asked for, of each image, in place of a bound."""
    found = []

    def bits_per_dim(self, model, batch, **options):
        unet = inspect.getclosurevars(model).nonlocals["unet"]
        monkeypatch.setattr(unet, "forward", lambda x, t, class_labels: found.extend(class_labels.tolist()))
        model(batch, 0)
        zeros = torch.zeros(len(batch))
        return BitsPerDim(zeros, zeros, zeros[:, None], zeros[:, None], zeros[:, None])

    monkeypatch.setattr(GaussianDiffusion, "bits_per_dim", bits_per_dim)
    return found


def test_classes_of_the_data(pets, tmp_path, capsys, asked):
    image, photos = pytest.importorskip("PIL.Image"), tmp_path / "photos"
    for place in ("dog/1", "cat/more/2", "dog/3"):
        (photos / place).parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(photos / f"{place}.png")
    shutil.copytree(photos / "dog", tmp_path / "dogs" / "dog")
    images = np.zeros((3, 8, 12, 3), np.uint8)
    np.savez(tmp_path / "labelled.npz", images, np.array([1, 0, 1], np.int32))
    np.savez(tmp_path / "plain.npz", images)
    for data, options, expected, whose in (
        ("photos", (), [0, 1, 1], " with their classes"),  # in the order of the paths
        ("dogs", (), [1, 1], " with their classes"),
        ("photos/dog", (), [3, 3], " without classes"),
        ("photos", ("--no-classes",), [3, 3, 3], " without classes"),
        ("photos", ("--class", "dog"), [1, 1, 1], " of class dog"),
        ("labelled.npz", ("--batch-size", 2), [1, 0, 1], " with their classes"),
        ("plain.npz", (), [3, 3, 3], " without classes"),
    ):
        asked.clear()
        assert call("bits-per-dim", tmp_path / data, "--model", pets, "--quiet", *options) == 0
        assert asked == expected and capsys.readouterr().out.startswith(f"{len(expected)} images{whose}: ")


def test_classes_that_the_model_does_not_know(pets, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "photos" / "cow").mkdir(parents=True)
    image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(tmp_path / "photos" / "cow" / "1.png")
    images = np.zeros((2, 8, 12, 3), np.uint8)
    np.savez(tmp_path / "short.npz", images, np.array([0]))
    np.savez(tmp_path / "floats.npz", images, np.zeros(2))
    for data, options, message in (
        ("photos", (), "cow is none of the model's classes, expected 0 to 2 or a name: cat, dog, hen; or --class"),
        ("short.npz", (), "holds arr_1, int64 of shape (1,), expected whole numbers >= 0 of shape (2,)"),
        ("floats.npz", (), "holds arr_1, float64 of shape (2,), expected whole numbers >= 0"),
        ("photos", ("--no-classes", "--class", "cat"), "no-classes: got --class cat, expected one of the two"),
    ):
        check_refused(capsys, message, "bits-per-dim", tmp_path / data, "--model", pets, *options)
