"""`ddpm-ext score`: the numbers of finished samples, whose features they are of, and what is refused."""

import json

import numpy as np
import pytest
import torch
from support.command_line import call, check_refused

from ddpm_ext.bulk.export import write_pngs
from ddpm_ext.bulk.shards import Shards
from ddpm_ext.cli.images import Samples
from ddpm_ext.training.data import load_images
from ddpm_ext.training.score import frechet, moments, pixels, precision_recall

PIXELS = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 1), np.uint8)


def rows(images):
    return images.mean(3).flatten(1)


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """That of samples in shards, which are also in pictures and in an .npz; it names code."""
    monkeypatch.chdir(tmp_path)
    shards = Shards(tmp_path / "many", len(PIXELS), 4, (8, 8, 1))
    shards.inside.mkdir(parents=True)
    for index in range(len(shards)):
        shards.write(index, PIXELS[shards.ids(index).start : shards.ids(index).stop])
    settings = {"num_images": len(PIXELS), "shard_size": 4, "shape": [8, 8, 1], "features": "evil:f"}
    shards.manifest.write_text(json.dumps({"settings": settings}))
    write_pngs(shards, tmp_path / "many" / "png")
    np.savez("a.npz", PIXELS)
    (tmp_path / "evil.py").write_text("raise SystemExit(7)\n")
    return shards.manifest


@pytest.mark.parametrize(
    ("samples", "out", "function"),
    [("many", "many/score.json", pixels), ("many/png", "many/png/score.json", rows), ("a.npz", "a.score.json", pixels)],
)
def test_numbers_are_those_of_the_features(manifest, capsys, samples, out, function):
    name, data = "pixels" if function is pixels else f"{__name__}:rows", load_images("digits")
    command = ["score", samples, "--data", "digits", "--features", name, "--batch-size", "4", "--device", "cpu"]
    assert call(*command, "--quiet") == 0
    told, found = capsys.readouterr().out, json.loads((manifest.parents[1] / out).read_text())
    ours = function(torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 127.5 - 1).double()
    theirs = function(data.batch(torch.arange(len(data)))).double()
    assert found["frechet_distance"] == pytest.approx(frechet(moments(ours), moments(theirs)), rel=1e-6)
    assert (found["precision"], found["recall"]) == precision_recall(theirs, ours)
    assert found["features"] == name and found["command"] == " ".join(["ddpm-ext", *command, "--quiet"])
    assert found["samples"]["count"] == 11 and {"ddpm_ext", "torch"} <= found["versions"].keys()
    assert f"features: {name}, " in told and "no FID" in told and out in told
    assert call(*command) == 0 and capsys.readouterr() == (told, "")  # a bar is for a terminal


def test_what_is_refused(manifest, capsys):
    def refused(message, samples, data="digits"):
        check_refused(capsys, message, "score", samples, "--data", data, "--features", "pixels", "--quiet")

    refused("samples: got nowhere, expected a folder, or an .npz or .npy of samples, that exists", "nowhere")
    refused("channels: got 1, but shapes have 3", "a.npz", "shapes")
    (manifest.parent / "png" / "options.json").write_text("{}")
    refused("samples: many/png is the folder of a training run, expected samples, such as", "many/png")
    (manifest.parent / "png" / "options.json").unlink()
    next(manifest.parent.glob("shards/*4-*.npy")).unlink()
    refused("samples: many lacks 1 of 3 shards", "many")
    for text in ("[]", '{"settings": {"num_images": 9, "shard_size": 0, "shape": []}}'):
        manifest.write_text(text)
        refused("is no manifest of samples", "many")


def test_pictures_have_the_shape_of_the_first_one_upright(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    exif = image.Exif()
    exif[0x0112] = 6  # rotate clockwise by 90 degrees
    image.new("L", (8, 5)).save(tmp_path / "a.png", exif=exif)
    found = Samples(str(tmp_path), "samples")
    assert found.shape == (1, 8, 5) and found.batch(torch.tensor([0])).shape == (1, 1, 8, 5)
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 10)  # Pillow refuses pictures of twice as many
    with pytest.raises(ValueError, match=r"samples: cannot read .*a.png: .* decompression bomb"):
        Samples(str(tmp_path), "samples")
