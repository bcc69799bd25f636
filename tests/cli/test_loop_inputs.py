"""`ddpm-ext sample` with images to begin from or to fill in, clips, and ways to call the model."""

import json
import warnings

import numpy as np
import pytest
import torch
from support import fake_cuda
from support.command_line import call, check_refused, save_tiny

from ddpm_ext import DynamicThreshold, GaussianDiffusion, Guidance, Inpaint, Interpolation, Philox, models, plots
from ddpm_ext.cli import loop_inputs
from ddpm_ext.cli.main import build_parser
from ddpm_ext.loop import loop
from ddpm_ext.loop.cuda_graphs import CudaGraphs

Image = pytest.importorskip("PIL.Image")

SHAPE = (3, 8, 12)
STEPS = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model, and images to begin from."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(folder / "tiny")
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (3, 8, 12, 3), dtype=np.uint8)
    (folder / "folder").mkdir()
    for name, image in zip("abc", pixels, strict=True):
        Image.fromarray(image).save(folder / "folder" / f"{name}.png")
    np.savez(folder / "images.npz", pixels)
    np.save(folder / "images.npy", unit(pixels).numpy())
    mask = np.zeros((8, 12), np.uint8)
    mask[:, :5] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    np.save(folder / "noise.npy", random.standard_normal((3, *SHAPE)).astype(np.float32))
    np.save(folder / "small.npy", np.zeros((1, 3, 4, 4), np.float32))
    np.save(folder / "huge.npy", np.full((1, *SHAPE), 1e300))
    (folder / "text.txt").touch()
    return folder


def unit(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def begin(folder):
    return unit(np.load(folder / "images.npz")["arr_0"])


def known(folder):
    return (torch.arange(12) < 5).expand(1, 1, 8, 12)


def sampled(folder, out, *options):
    """arr_0 of `ddpm-ext sample`, run in the folder of the images."""
    fixed = ("--model", "tiny", "--sampler", "ddim", "--steps", STEPS, "--quiet", "--out", out)
    assert call("sample", *fixed, *options) == 0
    with np.load(out) as found:
        return found["arr_0"].astype(int)


START = ("--start", "images.npz")
FILL = ("--inpaint", "folder", "--mask", "mask.png")
CASES = {
    "start": ((*START, "--strength", 0.5), lambda f: {"start": begin(f), "strength": 0.5}),
    "folder": (("--start", "folder"), lambda f: {"start": begin(f)}),
    "floats": (("--start", "images.npy"), lambda f: {"start": begin(f)}),
    "one": (("--start", "folder/b.png", "--num", 2), lambda f: {"start": begin(f)[[1, 1]]}),
    "path": (
        ("--start", "folder/a.png", "--to", "folder/b.png", "--num", 3),
        lambda f: {
            "start": Interpolation(begin(f)[[0, 0, 0]], begin(f)[[1, 1, 1]], torch.tensor([0, 0.5, 1])),
            "rng": Philox(0, sample_ids=torch.zeros(3, dtype=torch.int64)),
        },
    ),
    "weight": (
        (*START, "--to", "folder/a.png", "--weight", 0.25, "--mix", "lerp"),
        lambda f: {"start": Interpolation(begin(f), begin(f)[[0, 0, 0]], 0.25, "lerp")},
    ),
    "noise": (("--noise", "noise.npy"), lambda f: {"noise": torch.from_numpy(np.load(f / "noise.npy"))}),
    "fill": (FILL, lambda f: {"inpaint": Inpaint(begin(f), known(f))}),
    "jumps": (
        (*FILL, "--jump-length", 2, "--jump-n-sample", 2),
        lambda f: {"inpaint": Inpaint(begin(f), known(f), 2, 2)},
    ),
    "clip": (("--num", 2, "--clip", -0.5, 0.25), lambda f: {"clip_denoised": (-0.5, 0.25)}),
    "threshold": (
        ("--num", 2, "--threshold", 0.5, "--threshold-max", 1.5),
        lambda f: {"clip_denoised": DynamicThreshold(0.5, 1.5)},
    ),
    "autocast": (("--num", 2, "--autocast", "bfloat16"), lambda f: {"autocast": torch.bfloat16}),
}


@pytest.mark.parametrize("case", CASES)
def test_samples_are_those_of_the_loop(files, tmp_path, monkeypatch, case):
    """One sample for each image where no number is given, and the known part stays."""
    monkeypatch.chdir(files)
    options, expected = CASES[case]
    found, loaded = sampled(files, tmp_path / "a.npz", *options), models.load_model(files / "tiny")
    given = {"rng": Philox(0), "sampler": "ddim", "steps": STEPS, "record": "last", "progress": False}
    with torch.no_grad():
        wanted = loaded.settings.diffusion().p_sample_loop(loaded.unet, (len(found), *SHAPE), **given | expected(files))
    assert len(found) == (2 if "--num" in options and 2 in options else 3)
    assert abs(found - plots.to_uint8(wanted)).max() <= 1
    if "--inpaint" in options:
        assert abs(found - np.load(files / "images.npz")["arr_0"])[:, :, :5].max() <= 1


def test_images_follow_the_samples_into_batches_and_folders(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(files)
    near = (*START, "--strength", 0.5)
    whole = sampled(files, tmp_path / "a.npz", *near, "--num", 5)
    assert abs(sampled(files, tmp_path / "a.npz", *near, "--num", 5, "--batch-size", 3) - whole).max() <= 1
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
        sampled(files, tmp_path / "a.npz", "--num", 1, *given)
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
    [(("--num", 3, "--guidance", 2), "step"), (("--num", 3, "--guidance", 2), "loop"), (START, "loop"), (FILL, "step")],
)
def test_one_capture_for_each_shape(pets, files, tmp_path, monkeypatch, captures, options, graph):
    """Two samples and one: two captures, and the samples of a run without graphs, whose classes, noise and images
    differ from batch to batch."""
    monkeypatch.chdir(files)
    fixed = ("--model", pets, "--batch-size", 2, *options)
    found = [sampled(files, tmp_path / "a.npz", *fixed, *more) for more in ((), ("--graph", graph))]
    assert np.array_equal(*found) and len(captures) == 2 and len(np.unique(found[0].reshape(3, -1), axis=0)) == 3


def test_guidance_with_its_options_and_no_clip():
    parse = build_parser().parse_args
    assert loop_inputs.clip_of(parse(["sample", "--no-clip"])) is False
    assert loop_inputs.clip_of(parse(["invert", "a.png"])) is False
    assert loop_inputs.clip_of(parse(["bits-per-dim", "a.png"])) is True
    given = ["sample", "--guidance", "2", "--guidance-rescale", "0.7", "--guidance-interval", "5", "9"]
    assert loop_inputs.guidance_of(parse(given)) == Guidance(2.0, rescale=0.7, interval=(5.0, 9.0))


BAD = [
    (("--start", "nowhere"), "start: got nowhere, expected a file or a folder that exists"),
    (("--start", "text.txt"), "start: got text.txt, expected a picture, an .npz, an .npy or a folder"),
    (("--start", "small.npy"), "start: small.npy holds 1 samples of 3x4x4, expected 3x8x12"),
    (("--start", "huge.npy"), "start: huge.npy holds numbers that are not finite"),
    (("--clip", 1e300, 1e301), "clip_denoised is (1e+300, 1e+301), expected numbers up to 3.40282347e+38"),
    (("--to", "folder"), "to: got folder, expected --start beside it"),
    (("--inpaint", "folder", "--mask", "noise.npy"), "mask: got noise.npy, expected a picture ending in"),
    (("--no-clip", "--clip", -1, 1), "not allowed with argument --no-clip"),
    (("--guidance-rescale", 1), "guidance-rescale: belongs to --guidance"),
    (("--graph", "--compile", "max-autotune"), "compile is 'max-autotune', which makes CUDA graphs itself"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_one_sentence(files, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(files)
    out = tmp_path / "a.npz"
    check_refused(capsys, message, "sample", "--model", "tiny", "--num", 2, "--steps", 2, "--out", out, *options)
    assert not out.exists()
