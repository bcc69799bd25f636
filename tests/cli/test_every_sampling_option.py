"""Every option of the commands that draw samples does what the loop's option does, and a folder of samples knows it."""

import numpy as np
import pytest
import torch
from support.command_line import call
from support.every_option import Refused, Same, check_has_value, entries, options_of
from support.sampling_values import DDIM, SAMPLING, Drawn, Inputs, write_inputs

from ddpm_ext import GaussianDiffusion, plots

BARE = {"compile": Same(("--compile",), "by the stand-in below"), "graph": Same(("--graph", "loop"), "the same steps")}
BARE |= {"batch_size": Same(("--batch-size", 1), "a sample does not depend on its batch")}
BY_SAMPLE = SAMPLING | BARE | {
    "num_images": Refused(("--num-images", 2), "not allowed with argument --num"),  # test_sample_many.py
    "out": Refused(("--out", "a.txt"), "out: got a.txt"),
    "npz": Refused(("--npz",), "npz: belongs to --num-images"),
    "png": Refused(("--png",), "png: belongs to --num-images"),
    "shard_size": Same(("--shard-size", 1), "it belongs to --num-images"),
}  # fmt: skip
# Of the other commands' options, those of their pictures; test_every_option.py has these.
PICTURES = {"trajectory": ("out", "every"), "plot guidance": ("out",), "plot histogram": ("out", "bins", "limit")}
STAYS = {"device", "channels_last", "quiet", *BARE}  # change no bit, or none that a folder should care about


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(write_inputs(tmp_path_factory.mktemp("inputs")))


@pytest.fixture(autouse=True)
def begin(inputs, monkeypatch):
    monkeypatch.chdir(inputs.folder)
    monkeypatch.setattr(torch, "compile", lambda model, mode=None: model)


@pytest.fixture(scope="module")
def kept():
    """Results that several tests compare with, by their arguments."""
    return {}


def line(entry, *more):
    """The arguments of both commands of an entry, without and with its value."""
    first = ("--model", "pets", *getattr(entry, "steps", DDIM), *more, *(getattr(entry, "beside", None) or ()))
    return first, (*first, *entry.given)


def sampled(arguments, out):
    assert call("sample", *arguments, "--out", out) == 0
    with np.load(out) as found:
        return found["arr_0"].astype(int)


def refused(entry, capsys, *command):
    assert call(*command) == 2 and entry.message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*CUDA graph")
@pytest.mark.parametrize(("name", "entry"), entries(BY_SAMPLE, options_of("sample")))
def test_samples_are_those_of_the_loop(inputs, kept, tmp_path, capsys, name, entry):
    check_has_value(name, entry)
    first, second = line(entry, *() if name == "num" else ("--num", 2))
    if isinstance(entry, Refused):
        refused(entry, capsys, "sample", *second)
        return
    if first not in kept:
        kept[first] = sampled(first, tmp_path / "a.npz")
    found = sampled(second, tmp_path / "a.npz")
    if isinstance(entry, Same):
        assert abs(found - kept[first]).max() <= 1
    else:
        assert found.shape != kept[first].shape or abs(found - kept[first]).max() > 1
        assert abs(found - plots.to_uint8(inputs.loop(**entry.loop(inputs)))).max() <= (2 if name == "dtype" else 1)


@pytest.mark.filterwarnings("ignore:.*CUDA graph")
@pytest.mark.parametrize(("name", "entry"), entries(BY_SAMPLE, options_of("sample"), (Drawn, Same)))
def test_a_folder_goes_on_with_the_same_options_alone(kept, tmp_path_factory, capsys, name, entry):
    if name in ("num", "shard_size"):  # --num-images is the number; test_sample_many.py
        return
    first, second = line(entry, "--num-images", 2)
    if first not in kept:
        kept[first] = tmp_path_factory.mktemp("many") / "samples"
        assert call("sample", *first, "--out", kept[first]) == 0
    code = call("sample", *second, "--out", kept[first])
    assert code == (0 if name in STAYS else 2), name
    assert name in STAYS or "has samples of other settings" in capsys.readouterr().err


@pytest.mark.parametrize("command", PICTURES)
def test_pictures_are_of_the_same_loop(inputs, monkeypatch, capsys, command):
    real, drawn = GaussianDiffusion.p_sample_loop, []

    def stop(self, *arguments, **options):
        drawn.append(real(self, *arguments, **options).float())
        raise SystemExit(0)

    names = [name for name in options_of(*command.split()) if name not in PICTURES[command]]
    every = entries(SAMPLING, names)
    for name, entry in every:
        check_has_value(name, entry)
        more = ("--guidance", 1, "--quiet") if command == "plot guidance" else ("--quiet",)
        second = line(entry, *more, *() if name == "num" else ("--num", 2))[1]
        if isinstance(entry, Refused):
            refused(entry, capsys, *command.split(), "--device", "cpu", *second)
            continue
        expected = inputs.loop(**{} if isinstance(entry, Same) else entry.loop(inputs))
        with monkeypatch.context() as patch:
            patch.setattr(GaussianDiffusion, "p_sample_loop", stop)
            assert call(*command.split(), "--device", "cpu", *second) == 0, name
        tolerance = 0.02 if name in ("dtype", "autocast") else 1e-4
        torch.testing.assert_close(drawn.pop(), expected, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("given", [("--start", "images.npz"), ("--inpaint", "folder", "--mask", "mask.png")])
def test_one_sample_for_each_image_and_the_known_part_stays(inputs, tmp_path, given):
    found = sampled(("--model", "pets", *DDIM, *given), tmp_path / "a.npz")
    assert len(found) == 3
    if "--inpaint" in given:
        assert abs(found - np.load("images.npz")["arr_0"])[:, :, :5].max() <= 1
