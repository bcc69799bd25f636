"""`ddpm-ext score`: the numbers of finished samples, whose features they are of, and what is refused."""

import json

import numpy as np
import pytest
import torch
from support.command_line import call, check_refused

from ddpm_ext.bulk.export import write_pngs
from ddpm_ext.bulk.shards import MANIFEST, Shards
from ddpm_ext.training.data import load_images
from ddpm_ext.training.score import frechet, moments, pixels, precision_recall

N = 11


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Samples in a folder of shards, in pictures and in an .npz."""
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 1), np.uint8)
    shards = Shards(tmp_path / "many", N, 4, (8, 8, 1))
    shards.inside.mkdir(parents=True)
    for index in range(len(shards)):
        shards.write(index, images[shards.ids(index).start : shards.ids(index).stop])
    settings = {"num_images": N, "shard_size": 4, "shape": [8, 8, 1], "sampler": "ddim", "features": "evil:f"}
    shards.manifest.write_text(json.dumps({"settings": settings}))
    write_pngs(shards, tmp_path / "many" / "png")
    np.savez("a.npz", images)
    (tmp_path / "evil.py").write_text("raise SystemExit(7)\n")
    (tmp_path / "own.py").write_text("def rows(images):\n    return images.mean(3).flatten(1)\n")
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_numbers_of_a_folder_of_pictures_and_of_a_file(finished, tmp_path, capsys):
    data = load_images("digits")
    digits = data.batch(torch.arange(len(data)))
    for samples, out, function in (
        ("many", "many/score.json", "pixels"),
        ("many/png", "many/png/score.json", "own:rows"),
        ("a.npz", "a.score.json", "pixels"),
    ):
        command = ["score", samples, "--data", "digits", "--features", function, "--batch-size", "4", "--device", "cpu"]
        assert call(*command, "--quiet") == 0
        told, found = capsys.readouterr().out, json.loads((tmp_path / out).read_text())
        features = (lambda images: images.mean(3).flatten(1)) if function == "own:rows" else pixels
        ours, theirs = (features(images).double() for images in (finished, digits))
        assert found["frechet_distance"] == pytest.approx(frechet(moments(ours), moments(theirs)), rel=1e-6)
        assert (found["precision"], found["recall"]) == precision_recall(theirs, ours)
        assert found["features"] == function and found["command"] == " ".join(["ddpm-ext", *command, "--quiet"])
        assert found["samples"]["count"] == N and found["samples"].get("settings", {}).get("sampler", "ddim") == "ddim"
        assert {"ddpm_ext", "torch"} <= found["versions"].keys() and f"features: {function}, " in told
        assert "no FID" in told and out in told


def test_what_is_refused(finished, tmp_path, capsys):
    def refused(message, samples, data="digits", *more):
        check_refused(capsys, message, "score", samples, "--data", data, "--features", "pixels", "--quiet", *more)

    refused("samples: got nowhere, expected a folder, or an .npz or .npy of samples, that exists", "nowhere")
    refused("data: no such folder: nowhere", "a.npz", "nowhere")
    refused("channels: got 1, but shapes have 3", "a.npz", "shapes")
    refused("out: got a.txt, expected a name that ends in .json", "a.npz", "digits", "--out", "a.txt")
    (tmp_path / "many" / "shards" / "000000004-000000007.npy").unlink()
    refused("samples: many lacks 1 of 3 shards", "many")
    (tmp_path / "many" / MANIFEST).write_text("[]")
    refused("is no manifest of samples", "many")
