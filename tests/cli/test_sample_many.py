"""`ddpm-ext sample --num-images`: in one process, under torchrun, and killed and run again."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from support.command_line import call, in_forks, not_finite, save_tiny
from support.forks import said

from ddpm_ext import models
from ddpm_ext.cli.sample import model_hash
from ddpm_ext.models.folder import WEIGHTS, load_model
from ddpm_ext.models.scheduler import DiffusionSettings

N = 11


@pytest.fixture(scope="module")
def many(tiny, tmp_path_factory):
    """The folder of a run with three shards, drawn in batches of two."""
    folder = tmp_path_factory.mktemp("run") / "samples"
    assert call(*arguments(tiny, folder)) == 0
    return folder


def arguments(model, folder, *more):
    options = ("--num-images", N, "--shard-size", 4, "--batch-size", 2, "--steps", 6, "--quiet")
    return "sample", "--model", model, *options, "--out", folder, *more


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shards/*"))}


def pixels(folder):
    return np.concatenate([np.load(path) for path in sorted(folder.glob("shards/*.npy"))]).astype(int)


def test_same_samples_as_a_plain_run(tiny, tmp_path, many):
    plain = tmp_path / "a.npz"
    assert call("sample", "--model", tiny, "--num", N, "--steps", 6, "--out", plain, "--quiet") == 0
    # The noise has the same bits; the model's sums may be rounded differently in a batch of another size.
    assert abs(pixels(many) - np.load(plain)["arr_0"]).max() <= 1
    assert call(*arguments(tiny, tmp_path / "3", "--batch-size", 3)) == 0
    assert abs(pixels(many) - pixels(tmp_path / "3")).max() <= 1


def test_writes_what_fid_scripts_read(tiny, tmp_path, monkeypatch, capsys, device):
    image = pytest.importorskip("PIL.Image")
    loud = [argument for argument in arguments(tiny, "new/run", "--npz", "--png") if argument != "--quiet"]
    monkeypatch.chdir(tmp_path)
    assert call(*loud, "--device", device) == 0
    written = capsys.readouterr()
    first, *files = written.out.splitlines()
    assert first.startswith(f"new/run: {N} samples, 8x12x3; {N} drawn in ")
    assert first.endswith(" images/s")
    assert files == [f"new/run/samples_{N}x8x12x3.npz", "new/run/png"]
    assert f"{N}/{N}" in written.err  # the bar
    assert written.err.count("sampling loop") == 0
    with np.load(tmp_path / files[0]) as opened:
        assert opened.files[0] == "arr_0"
        assert np.array_equal(opened["arr_0"], pixels(tmp_path / "new" / "run"))
        for i in range(N):
            with image.open(tmp_path / files[1] / f"{i:06d}.png") as picture:
                assert np.array_equal(np.asarray(picture), opened["arr_0"][i])


def test_outputs_of_a_run_that_is_done(tiny, tmp_path, many, capsys):
    assert call(*arguments(tiny, many, "--npz", tmp_path / "a" / "b.npz", "--device", "cpu", "--batch-size", 5)) == 0
    assert capsys.readouterr().out == f"{many}: {N} samples, 8x12x3\n{tmp_path / 'a' / 'b.npz'}\n"
    assert np.array_equal(np.load(tmp_path / "a" / "b.npz")["arr_0"], pixels(many))


def test_other_settings_are_refused(tiny, tmp_path, many, capsys):
    other = save_tiny(tmp_path / "other")
    assert call(*arguments(other, many, "--eta", 0)) == 0  # the same model in another place; ddpm has no eta
    weights = models.read_weights(other / WEIGHTS)
    next(iter(weights.values())).add_(1)
    from safetensors.torch import save_file

    save_file(weights, other / WEIGHTS)
    before = shards(many)
    changes = {
        "seed is 0 there and 1 here": ("--seed", 1),
        "sampler is ddpm there and ddim here; eta is None there and 0.0 here": ("--sampler", "ddim"),
        "steps is 6 there and 7 here": ("--steps", 7),
        "spacing is linspace there and leading here": ("--spacing", "leading"),
        "dtype is float32 there and bfloat16 here": ("--dtype", "bfloat16"),
        "backend is fused there and reference here": ("--backend", "reference"),
        f"num_images is {N} there and 12 here": ("--num-images", 12),
        "shard_size is 4 there and 5 here": ("--shard-size", 5),
        "model_sha256 is ": ("--model", other),
    }
    capsys.readouterr()
    for message, options in changes.items():
        assert call(*arguments(tiny, many, *options)) == 2
        written = capsys.readouterr()
        assert f"out: {many} has samples of other settings: {message}" in written.err
        assert (written.err.count("\n"), written.out) == (1, "")
    assert shards(many) == before


def test_npz_says_how_its_samples_were_made(tiny, tmp_path, many):
    """By the settings of the manifest that have a value, both with --num-images and with --num."""
    found = json.loads((many / "manifest.json").read_text())
    assert found["about"]["model"] == str(tiny)
    settings = found["settings"]
    assert len(settings.pop("model_sha256")) == 64 and settings.pop("version")
    expected = {"sampler": "ddpm", "steps": 6, "spacing": "linspace", "eta": None, "seed": 0, "dtype": "float32"}
    assert settings == expected | {"backend": "fused", "num_images": N, "shard_size": 4, "shape": [8, 12, 3]}
    changed = ("--sampler", "ddim", "--eta", 0.5, "--clip", -2, 2, "--seed", 2**64 - 1)
    assert call(*arguments(tiny, tmp_path / "many", "--npz", tmp_path / "many.npz", *changed)) == 0
    plain = ("--num", 2, "--steps", 6, "--quiet", "--out", tmp_path / "plain.npz")
    assert call("sample", "--model", tiny, *plain, *changed) == 0
    expected = json.loads((tmp_path / "many" / "manifest.json").read_text())["settings"]
    assert (expected["clip"], expected["eta"], expected["seed"]) == ([-2, 2], 0.5, 2**64 - 1)
    for name in ("num_images", "shard_size", "shape"):
        del expected[name]
    for path in ("many.npz", "plain.npz"):
        with np.load(tmp_path / path, allow_pickle=False) as opened:
            assert opened.files == ["arr_0", *expected]
            assert {name: opened[name].tolist() for name in expected} == expected
    assert call(*arguments(tiny, many, "--npz", tmp_path / "no_eta.npz")) == 0
    with np.load(tmp_path / "no_eta.npz") as opened:
        assert "eta" not in opened.files


def test_samples_that_are_not_finite_are_counted_in_the_manifest(tiny, tmp_path, many, capsys):
    folder = tmp_path / "samples"
    options = arguments(not_finite(tiny, tmp_path / "model"), folder)
    for _ in range(2):  # also where all samples are there already
        assert call(*options) == 2
        assert f"out: {N} of {N} samples are not finite, and black in {folder}" in capsys.readouterr().err
        assert json.loads((folder / "manifest.json").read_text())["not_finite"] == N
    (folder / "shards" / "000000000-000000003.npy").unlink()
    assert call(*options) == 2
    assert json.loads((folder / "manifest.json").read_text())["not_finite"] == N
    assert json.loads((many / "manifest.json").read_text())["not_finite"] == 0


def test_plain_sample_among_ranks_is_refused(tiny, tmp_path, monkeypatch, capsys):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert call("sample", "--model", tiny, "--out", tmp_path / "a.npz") == 2
    message = "ddpm-ext sample, rank 1: num: draws in one process, expected --num-images among several ranks\n"
    assert capsys.readouterr().err == message
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork")
def test_ranks_that_are_killed_and_run_again(tiny, tmp_path):
    """Rank 1 is killed after its second shard, as soon as rank 0 has two, too."""
    options = ("--num-images", 24, "--shard-size", 1)
    folder = tmp_path / "many"
    rank = {"arguments": arguments(tiny, folder, *options)}
    first, killed = in_forks(tmp_path, {"killed": [rank, rank | {"kill_at": (2, 4)}]})["killed"]
    assert first > 0 and killed == -signal.SIGKILL
    kept = len(list(folder.glob("shards/0*.npy")))
    assert 4 <= kept <= 14
    assert in_forks(tmp_path, {"again": [rank, rank]}) == {"again": [0, 0]}, said(tmp_path / "again", 0)
    text = said(tmp_path / "again", 0, "out")
    assert f"{folder}: 24 samples, 8x12x3; {24 - kept} drawn in " in text
    assert text.rstrip().endswith("images/s on 2 ranks") and said(tmp_path / "again", 1, "out") == ""
    assert call(*arguments(tiny, tmp_path / "one", *options)) == 0
    assert shards(folder) == shards(tmp_path / "one")


def test_all_betas_enter_the_models_hash(tiny):
    """Also those that its settings' repr leaves out."""
    loaded = load_model(tiny)
    hashes = {
        model_hash(replace(loaded, settings=DiffusionSettings(20, (0.1, beta, 0.2)))) for beta in (0.11, 0.12, 0.12)
    }
    assert len(hashes) == 2
