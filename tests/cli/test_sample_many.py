"""`ddpm-ext sample --num-images` in one process; tests/bulk has runs of several, which are killed and go on.

tests/cli/test_classes.py and test_loop_inputs.py compare the samples with those of --num.
"""

import json
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
from support.command_line import call, not_finite, save_tiny

from ddpm_ext.cli import sample
from ddpm_ext.cli.network import model_hash
from ddpm_ext.models.folder import load_model

N = 11


@pytest.fixture(scope="module")
def many(tiny, tmp_path_factory):
    """The folder of a run with three shards, drawn in batches of two."""
    folder = tmp_path_factory.mktemp("run") / "samples"
    assert call(*arguments(tiny, folder)) == 0
    return folder


def arguments(model, folder, *more):
    options = ("--num-images", N, "--shard-size", 4, "--batch-size", 2, "--steps", 6, "--quiet", "--sampler", "ddpm")
    return "sample", "--model", model, *options, "--out", folder, *more


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shards/*"))}


def pixels(folder):
    return np.concatenate([np.load(path) for path in sorted(folder.glob("shards/*.npy"))]).astype(int)


def test_writes_what_fid_scripts_read(tiny, tmp_path, monkeypatch, capsys, device):
    image = pytest.importorskip("PIL.Image")
    loud = [argument for argument in arguments(tiny, "new", "--npz", "--png") if argument != "--quiet"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert call(*loud, "--device", device) == 0
    written = capsys.readouterr()
    first, *files = written.out.splitlines()
    assert first.startswith(f"new: {N} samples, 8x12x3; {N} drawn in ") and first.endswith(" images/s")
    assert files == [f"new/samples_{N}x8x12x3.npz", "new/png"]
    assert f"{N}/{N}" in written.err and written.err.count("sampling loop") == 0
    with np.load(tmp_path / files[0]) as opened:
        assert opened.files[0] == "arr_0" and np.array_equal(opened["arr_0"], pixels(tmp_path / "new"))
        for i in range(N):
            with image.open(tmp_path / files[1] / f"{i:06d}.png") as picture:
                assert np.array_equal(np.asarray(picture), opened["arr_0"][i])
    more = [str(N + 1) if argument == N else argument for argument in loud if argument != "--png"]
    assert call(*more, "--device", device) == 0
    other = f"new also has samples_{N}x8x12x3.npz, of another number of samples"
    assert other in capsys.readouterr().out.splitlines() and (tmp_path / f"new/samples_{N + 1}x8x12x3.npz").is_file()


def test_the_same_model_in_another_place_goes_on(tmp_path, many):
    """test_every_sampling_option.py has the options that do not."""
    before = shards(many)
    assert call(*arguments(save_tiny(tmp_path / "other"), many, "--eta", 0)) == 0  # ddpm has no eta
    assert shards(many) == before


def test_npz_says_how_its_samples_were_made(tiny, tmp_path, many, capsys):
    """By the settings of the manifest that have a value, both with --num-images and with --num."""
    found = json.loads((many / "manifest.json").read_text())
    assert found["about"]["model"] == str(tiny)
    settings = found["settings"]
    assert len(settings.pop("model_sha256")) == 64 and settings.pop("version")
    expected = {"sampler": "ddpm", "steps": 6, "spacing": "trailing", "eta": None, "seed": 0, "dtype": "float32"}
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
    capsys.readouterr()  # a run that is done, with an output that it did not have
    assert call(*arguments(tiny, many, "--npz", tmp_path / "no_eta.npz", "--batch-size", 5)) == 0
    assert capsys.readouterr().out == f"{many}: {N} samples, 8x12x3\n{tmp_path / 'no_eta.npz'}\n"
    with np.load(tmp_path / "no_eta.npz") as opened:
        assert "eta" not in opened.files and np.array_equal(opened["arr_0"], pixels(many))
    settings = [replace(load_model(tiny).settings, beta_schedule=(0.1, beta, 0.2)) for beta in (0.11, 0.12, 0.12)]
    assert len({model_hash(replace(load_model(tiny), settings=own)) for own in settings}) == 2  # by all betas


def test_samples_that_are_not_finite_are_counted_in_the_manifest(tiny, tmp_path, many, capsys):
    folder = tmp_path / "samples"
    options = arguments(not_finite(tiny, tmp_path / "model"), folder)
    for _ in range(2):  # also where all samples are there already
        assert call(*options) == 2
        assert f"out: {N} of {N} samples are not finite, and black in {folder}" in capsys.readouterr().err
        assert json.loads((folder / "manifest.json").read_text())["not_finite"] == N
    (folder / "shards" / "000000000-000000003.npy").unlink()
    assert call(*options) == 2 and json.loads((folder / "manifest.json").read_text())["not_finite"] == N
    assert json.loads((many / "manifest.json").read_text())["not_finite"] == 0


def test_ctrl_c_says_that_the_same_command_goes_on(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "draw", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it
    try:
        assert call(*arguments(tiny, tmp_path / "samples")) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    message = "interrupted; what was finished is kept: run the same command again to go on"
    assert capsys.readouterr().err == f"\nddpm-ext sample: {message}\n"


def test_plain_sample_among_ranks_is_refused(tiny, tmp_path, monkeypatch, capsys):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert call("sample", "--model", tiny, "--out", tmp_path / "a.npz") == 2
    message = "ddpm-ext sample, rank 1: num: draws in one process, expected --num-images among several ranks\n"
    assert capsys.readouterr().err == message and not list(tmp_path.iterdir())
