"""`--network`: runs of modules of one's own at the command line, and runs that go on."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from support.command_line import call, save_tiny
from support.trainer_run import IMAGES, make

from ddpm_ext import plots, training

N = 5
LOOP = ("--num", N, "--sampler", "ddim", "--steps", 4, "--quiet")
# A file of a user's, with a class, with one that takes arguments, and with functions, of which most are no good.
MODELS = """
from support.trainer_run import Conditional, Tiny

class Pets(Conditional):
    def __init__(self):
        super().__init__(3)

class Wide(Tiny):
    def __init__(self, width):
        super().__init__(width=width)

def wide():
    return Wide(7)

def nothing():
    return 3

def broken():
    return {}['width']

number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch, threads):
    """A folder with the user's file, in which the commands run; the file can be imported there alone."""
    threads(1)
    (tmp_path / "own_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    return tmp_path


def labelled():
    return torch.utils.data.TensorDataset(IMAGES, torch.arange(6) % 2)


def samples(*options):
    assert call("sample", *options, *LOOP, "--out", "a.npz") == 0
    with np.load("a.npz") as found:
        return dict(found)


def own(name, *arguments):
    import own_models

    return getattr(own_models, name)(*arguments)


def near(found, expected):
    return abs(found.astype(int) - plots.to_uint8(expected)).max() <= 1


def test_samples_are_those_of_load(here):
    make("run", model=own("wide"), steps=4).fit()
    found = samples("--model", "run", "--network", "own_models:wide", "--seed", 3)
    trained = training.load("run", own("wide"))
    assert near(found["arr_0"], trained.sample(N, seed=3, sampler="ddim", steps=4)) and "arr_1" not in found
    # The other commands that call a model, and the folder of many images.
    named = ("--model", "run", "--network", "own_models:wide", "--quiet", "--steps", 4)
    assert call("invert", "a.npz", *named, "--out", "noise.npy") == 0
    assert call("trajectory", *named, "--num", 2, "--out", "a.png") == 0
    assert call("plot", "histogram", *named, "--num", 2, "--out", "h.png") == 0
    assert call("bits-per-dim", "a.npz", *named[:-2]) == 0
    many = ("--num-images", N, "--seed", 3, "--sampler", "ddim", "--out", "many", "--npz", "many.npz")
    for _ in range(2):
        assert call("sample", *named, *many, "--channels-last") == 0
        with np.load("many.npz") as again:
            assert abs(again["arr_0"].astype(int) - found["arr_0"]).max() <= 1
            assert again["model_sha256"] == found["model_sha256"]


def test_classes_and_guidance(here):
    make("run", model=own("Pets"), data=labelled(), classes=True, steps=4).fit()
    named = ("--model", "run", "--network", "own_models:Pets")
    trained, found = training.load("run", own("Pets")), samples(*named)
    assert near(found["arr_0"], trained.sample(N, sampler="ddim", steps=4))
    assert found["arr_1"].tolist() == [0, 1, 0, 1, 0]
    one = samples(*named, "--class", 1)
    assert near(one["arr_0"], trained.sample(N, classes=[1], sampler="ddim", steps=4))
    strong = samples(*named, "--class", 1, "--guidance", 3)["arr_0"]
    other = samples(*named, "--class", 1, "--guidance", 3, "--null-class", 0)["arr_0"]
    assert not np.array_equal(strong, one["arr_0"]) and not np.array_equal(strong, other)
    assert call("plot", "guidance", *named, "--steps", 2, "--num", 2, "--quiet", "--out", "g.png") == 0


def test_message_says_which_name_is_missing(here, capsys, monkeypatch):
    """The class that trained the run, with its module where that can be imported; nothing is imported by itself."""
    make("run", model=own("wide"), steps=2).fit()
    assert call("sample", "--model", "run", *LOOP) == 2
    message = "run is a run of a Wide, expected --network own_models:Wide, or another class or function that makes "
    assert message in capsys.readouterr().err
    path = here / "run" / "model.json"
    described = json.loads(path.read_text())
    assert described.pop("network") == "own_models:Wide"
    path.write_text(json.dumps(described))  # as before it was written there
    assert call("sample", "--model", "run", *LOOP) == 2
    assert "expected --network MODULE:Wide, or another" in capsys.readouterr().err
    path.unlink()
    assert call("sample", "--model", "run", *LOOP) == 2
    assert "run is a run of a Wide, expected --network MODULE:Wide" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "own_models")  # the console script does not look in the working directory
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(here))])
    assert call("sample", "--model", "run", "--network", "own_models:wide", *LOOP, "--out", "a.png") == 0


BAD = [
    ("own_models", "network: got own_models, expected MODULE:NAME"),
    ("own_models:Nobody", r"network: own_models:Nobody can't be imported \(module 'own_models' has no attribute"),
    ("nowhere:Nobody", "network: nowhere:Nobody can't be imported .No module named 'nowhere'"),
    ("own_models:number", "network: own_models:number is a int, expected a class or a function"),
    ("own_models:nothing", r"network: own_models:nothing\(\) returns a int, expected a torch.nn.Module"),
    ("own_models:Wide", r"network: own_models:Wide\(\) fails \(.*missing 1 required positional argument: 'width'\), "),
    ("own_models:Pets", "model: run.model.safetensors holds .* than the Pets: into.weight has shape"),
]


def test_wrong_networks(here, capsys):
    make("run", model=own("wide"), steps=2).fit()
    for name, message in BAD:
        assert call("sample", "--model", "run", "--network", name, *LOOP) == 2
        said = capsys.readouterr().err
        assert re.search(message, said) and said.count("\n") == 1 and not (here / "a.npz").exists()
    assert call("sample", "--model", "run", "--network", "own_models:broken", *LOOP) == 2
    said = capsys.readouterr().err
    assert "network: own_models:broken raised KeyError\n" in said and "{}['width']" in said and "ddpm_ext" not in said
    save_tiny(here / "tiny")
    for model in ("digits", "tiny"):
        assert call("sample", "--model", model, "--network", "own_models:wide", *LOOP) == 2
        assert f"network: got own_models:wide, but {model} is a UNet2DModel, which" in capsys.readouterr().err
