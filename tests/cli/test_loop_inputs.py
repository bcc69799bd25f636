"""`ddpm-ext sample` with images in batches and folders, ways to call the model, and wrong input.

test_every_sampling_option.py compares the samples with those of the loop.
"""

import json
import warnings

import numpy as np
import pytest
import torch
from support import fake_cuda
from support.command_line import call, check_refused, save_tiny
from support.sampling_values import write_inputs

from ddpm_ext import GaussianDiffusion
from ddpm_ext.cli import loop_inputs
from ddpm_ext.cli.main import build_parser
from ddpm_ext.loop import loop
from ddpm_ext.loop.cuda_graphs import CudaGraphs

Image = pytest.importorskip("PIL.Image")

STEPS = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images to begin from, and a tiny model."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    save_tiny(folder / "tiny")
    return folder


def sampled(out, *options):
    """arr_0 of `ddpm-ext sample`, run in the folder of the images."""
    fixed = ("--model", "tiny", "--sampler", "ddim", "--steps", STEPS, "--quiet", "--out", out)
    assert call("sample", *fixed, *options) == 0
    with np.load(out) as found:
        return found["arr_0"].astype(int)


START, FILL = ("--start", "images.npz"), ("--inpaint", "folder", "--mask", "mask.png")


def test_images_follow_the_samples_into_batches_and_folders(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(files)
    near = (*START, "--strength", 0.5)
    whole = sampled(tmp_path / "a.npz", *near, "--num", 5)
    assert abs(sampled(tmp_path / "a.npz", *near, "--num", 5, "--batch-size", 3) - whole).max() <= 1
    many = ("sample", "--model", "tiny", "--sampler", "ddim", "--steps", STEPS, "--quiet", "--num-images", 5)
    many += ("--shard-size", 2, "--batch-size", 2, "--out", tmp_path / "many")
    assert call(*many, *near) == 0
    found = [np.load(path) for path in sorted((tmp_path / "many" / "shards").glob("*.npy"))]
    assert abs(np.concatenate(found).astype(int) - whole).max() <= 1
    settings = json.loads((tmp_path / "many" / "manifest.json").read_text())["settings"]
    assert (settings["strength"], len(settings["start"])) == (0.5, 64)
    assert call(*many, "--start", "images.npy", "--strength", 0.5) == 0  # the same images
    assert call(*many, "--start", "folder/a.png", "--strength", 0.5) == 2
    assert "samples of other settings: start is" in capsys.readouterr().err


def test_ways_to_call_the_model(files, tmp_path, monkeypatch):
    """The loop gets what it is to compile and to capture; the weights lie as they are asked to."""
    monkeypatch.chdir(files)
    seen = {}

    def called(self, model, shape, **options):
        seen.update(options, weight=model.conv_in.weight)
        return torch.zeros(shape)

    monkeypatch.setattr(GaussianDiffusion, "p_sample_loop", called)

    def captured(self, model, shape, **options):
        return lambda *_, **__: called(self, model, shape, **options)

    monkeypatch.setattr(GaussianDiffusion, "capture", captured)
    for given, compiled, graph in (
        (("--compile",), True, False),
        (("--compile", "default", "--graph"), "default", "step"),
        (("--graph", "loop", "--channels-last"), False, "loop"),
    ):
        sampled(tmp_path / "a.npz", "--num", 1, *given)
        assert (seen["compile"], seen["graph"]) == (compiled, graph)
        layout = torch.channels_last if "--channels-last" in given else torch.contiguous_format
        assert seen["weight"].is_contiguous(memory_format=layout)


@pytest.fixture
def captures(monkeypatch):
    """The loops that are captured, as their CudaGraphs, by a faked torch.cuda."""
    fake_cuda.install(monkeypatch)
    made = []

    def graphs(device):
        made.append(CudaGraphs(torch.device("cuda")))
        return made[-1]

    monkeypatch.setattr(loop, "CudaGraphs", graphs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield made


@pytest.mark.parametrize(
    ("options", "graph"),
    [(("--guidance", 2), "step"), (("--guidance", 2), "loop"), (START, "loop"), (FILL, "step")],
)
def test_one_capture_for_each_shape(pets, files, tmp_path, monkeypatch, captures, options, graph):
    """Two batches of two samples and one of one: two captures, and the samples of a run without graphs, whose classes,
    noise and images differ from batch to batch."""
    monkeypatch.chdir(files)
    fixed = ("--model", pets, "--batch-size", 2, *options, "--num", 5)
    found = [sampled(tmp_path / "a.npz", *fixed, *more) for more in ((), ("--graph", graph))]
    assert np.array_equal(*found) and len(captures) == 2 and len(np.unique(found[0].reshape(5, -1), axis=0)) == 5


def test_inversion_clips_nothing_by_default():
    assert loop_inputs.clip_of(build_parser().parse_args(["invert", "a.png"])) is False


BAD = [
    (("--start", "nowhere"), "start: got nowhere, expected a file or a folder that exists"),
    (("--start", "text.txt"), "start: got text.txt, expected a picture, an .npz, an .npy or a folder"),
    (("--start", "small.npy"), "start: small.npy holds 1 samples of 3x4x4, expected 3x8x12"),
    (("--start", "huge.npy"), "start: huge.npy holds numbers that are not finite"),
    (("--clip", 1e300, 1e301), "clip_denoised is (1e+300, 1e+301), expected numbers up to 3.40282347e+38"),
    (("--to", "folder"), "to: got folder, expected --start as well"),
    (("--inpaint", "folder", "--mask", "noise.npy"), "mask: got noise.npy, expected a picture ending in"),
    (("--no-clip", "--clip", -1, 1), "not allowed with argument --no-clip"),
    (("--guidance-rescale", 1), "guidance-rescale: belongs to --guidance"),
    (("--graph", "--compile", "max-autotune"), "compile is 'max-autotune' with graph, expected one"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_one_sentence(files, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(files)
    out = tmp_path / "a.npz"
    check_refused(capsys, message, "sample", "--model", "tiny", "--num", 2, "--steps", 2, "--out", out, *options)
    assert not out.exists()
