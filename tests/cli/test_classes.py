"""`ddpm-ext` with a class-conditional model: samples, many samples, trajectories, rising guidance."""

import json
import shutil

import numpy as np
import pytest
from support.command_line import call, check_refused

from ddpm_ext import plots

Image = pytest.importorskip("PIL.Image")

N = 7


def sample(model, folder, *options):
    """arr_0 and arr_1 of `ddpm-ext sample`."""
    out = folder / "a.npz"
    assert call("sample", "--model", model, "--num", N, "--steps", 4, "--quiet", "--out", out, *options) == 0
    with np.load(out) as found:
        return found["arr_0"], found["arr_1"]


def test_many_samples_are_those_of_one_run(pets, tmp_path, capsys):
    """test_every_sampling_option.py compares the samples with those of the loop."""
    images, labels = sample(pets, tmp_path, "--class", "2,dog", "--guidance", 2)
    assert labels.tolist() == [2, 1, 2, 1, 2, 1, 2] and labels.dtype == np.int64
    many = ("--num-images", N, "--shard-size", 3, "--batch-size", 2, "--steps", 4, "--quiet", "--npz")
    command = ("sample", "--model", pets, *many, "--class", "hen,dog", "--out", tmp_path / "many")
    assert call(*command, "--guidance", 2) == 0
    with np.load(tmp_path / "many" / f"samples_{N}x8x12x3.npz") as found:
        assert abs(found["arr_0"].astype(int) - images).max() <= 1 and np.array_equal(found["arr_1"], labels)
        assert found.files[:2] == ["arr_0", "arr_1"]
        of_classes = {name: found[name].tolist() for name in ("classes", "guidance", "null_class")}
    assert of_classes == {"classes": [2, 1], "guidance": 2, "null_class": 3}
    settings = json.loads((tmp_path / "many" / "manifest.json").read_text())["settings"]
    assert (settings["classes"], settings["guidance"], settings["null_class"]) == ([2, 1], 2, 3)
    assert call(*command, "--guidance", 3) == 2 and "guidance is 2.0 there and 3.0 here" in capsys.readouterr().err


def test_trajectory_and_rising_guidance(pets, tmp_path, capsys, monkeypatch):
    """The row of a scale is what sample draws; the strips and the frames of a trajectory name the classes."""
    options = ("--model", pets, "--num", 3, "--steps", 4, "--class", "dog,cat", "--quiet", "--device", "cpu")
    out, drawn = tmp_path / "a.png", []

    def watch(name):
        real = getattr(plots, name)
        monkeypatch.setattr(plots, name, lambda *shown, **how: drawn.append(how["names"]) or real(*shown, **how))

    for name, ending in (("trajectory", ".png"), ("trajectory_frames", ".gif")):
        watch(name)
        assert call("trajectory", *options, "--guidance", 2, "--every", 1, "--out", out.with_suffix(ending)) == 0
    assert drawn == [["dog", "cat", "dog"]] * 2
    assert call("plot", "guidance", *options, "--guidance", "0,1,4", "--out", out) == 0
    assert "3 samples with guidance 0, 1, 4" in capsys.readouterr().out
    with Image.open(out) as opened:
        found = np.asarray(opened)
    for row, scale in enumerate((0, 1, 4)):
        alone = plots.grid(sample(pets, tmp_path, "--class", "dog,cat", "--guidance", scale)[0][:3], columns=3)
        pitch = alone.shape[0] - 4
        assert abs(found[56 + row * pitch :][: len(alone), : alone.shape[1]].astype(int) - alone).max() <= 1


def test_wrong_classes(pets, tiny, tmp_path, capsys):
    for model, options, message in (
        (pets, ("--class", "cow"), "class: got cow, expected 0 to 2 or a name: cat, dog, hen"),
        (pets, ("--class", "cat,"), "class: got , expected 0 to 2"),
        (pets, ("--null-class", 4), "null-class: got 4, expected 0 to 3, the model's classes"),
        (pets, ("--guidance", "nan"), "argument --guidance: got nan, expected a finite number"),
        *((tiny, (f"--{option}", 1), f"{option}: got 1") for option in ("class", "guidance", "null-class")),
    ):
        check_refused(capsys, message, "sample", "--model", model, *options, "--out", tmp_path / "a.npz")


def test_null_class_of_another_programs_model_is_asked_for(pets, tmp_path, capsys):
    (shutil.copytree(pets, tmp_path / "theirs") / "classes.json").unlink()
    command = ("sample", "--model", tmp_path / "theirs", "--num", 1, "--steps", 2, "--quiet", "--guidance", 2)
    assert call(*command, "--out", tmp_path / "a.npz") == 2
    assert "does not say which class is the null class, expected --null-class" in capsys.readouterr().err
    assert call(*command, "--null-class", 3, "--class", 2, "--out", tmp_path / "a.npz") == 0
