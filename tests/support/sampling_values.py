"""For each option of the commands that draw samples: a value, and the arguments of Inputs.loop that it should set.

Tests check that the value changes the samples as these arguments do, or that it is refused, or changes nothing. The
model is that of save_pets, with 100 timesteps. Paths are relative to the folder of write_inputs.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from support.command_line import save_pets
from support.every_option import Refused, Same

from ddpm_ext import DynamicThreshold, Guidance, Inpaint, Interpolation, Philox, StepTable, models
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import make_loop_rows
from ddpm_ext.models.classes import Classes
from ddpm_ext.models.scheduler import DiffusionSettings

SHAPE = (3, 8, 12)
DDIM = ("--sampler", "ddim", "--steps", 4)


class Drawn(NamedTuple):
    """A value of an option that changes the samples.

    given: the option and its value as arguments of the command. loop: a function from Inputs to the arguments of
        Inputs.loop that give the same samples. beside: other arguments of the command, which the option needs. steps:
        the command's arguments for the sampler and its steps.
    """

    given: Any
    loop: Any
    beside: Any = ()
    steps: Any = DDIM


class Inputs:
    """The contents of the files of write_inputs."""

    def __init__(self, folder):
        self.folder, self.loaded = folder, models.load_model(folder / "pets")
        self.images = unit(np.load(folder / "images.npz")["arr_0"])
        self.noise = torch.from_numpy(np.load(folder / "noise.npy"))
        self.table = StepTable.load(folder / "table.json")
        self.left = (torch.arange(12) < 5).expand(1, 1, 8, 12)

    def guided(self, scale, null=3, **more):
        def unconditional(x, t):
            return self.loaded.unet(x, t, torch.full((len(x),), null))

        return {"guidance": Guidance(scale, unconditional, **more)}

    def path(self, weight, mix="slerp"):
        return {"start": Interpolation(self.images[:2], self.images[[2, 2]], weight, mix)}

    def fill(self, **jumps):
        return {"inpaint": Inpaint(self.images[:2], self.left, **jumps)}

    @torch.no_grad()
    def loop(self, count=2, labels=(0, 1, 2), model="pets", **options):
        """The samples of p_sample_loop with these options. model: a folder. labels: sample i has labels[i % len]."""
        loaded = models.load_model(self.folder / model, dtype=options.get("dtype", torch.float32))
        kwargs = {"class_labels": torch.tensor([labels[i % len(labels)] for i in range(count)])}
        given = {"sampler": "ddim", "steps": 4, "rng": Philox(0), "model_kwargs": kwargs} | options
        diffusion, shape = loaded.settings.diffusion(), (count, *SHAPE)
        return diffusion.p_sample_loop(loaded.unet, shape, record="last", progress=False, **given).float()


def unit(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def write_inputs(folder):
    """Writes models with classes, images, masks, noise and a step table to a folder. Returns the folder."""
    unet, settings = models.load_model(save_pets(folder / "pets")).unet, DiffusionSettings(timesteps=100)
    for name, factor in (("pets", 1), ("other", 2)):
        with torch.no_grad():
            unet.conv_out.weight.mul_(factor)
        models.save_model(unet, settings, folder / name, classes=Classes(("cat", "dog", "hen"), 3))
    make_loop_rows(settings.diffusion(), LoopOptions(sampler="euler", steps=3)).table.save(folder / "table.json")
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
    Image.fromarray(255 - mask).save(folder / "right.png")
    np.save(folder / "noise.npy", random.standard_normal((3, *SHAPE)).astype(np.float32))
    np.save(folder / "small.npy", np.zeros((1, 3, 4, 4), np.float32))
    np.save(folder / "huge.npy", np.full((1, *SHAPE), 1e300))
    many = random.integers(0, 256, (5, 8, 12, 3), dtype=np.uint8)
    np.savez(folder / "five.npz", arr_0=many, arr_1=np.array([0, 1, 2, 0, 1]))
    np.save(folder / "five.npy", unit(many[::-1] // 2).numpy())
    (folder / "text.txt").touch()
    return folder


HALF, START = ("--strength", 0.5), ("--start", "images.npz")
TO, FILL = ("--to", "folder/c.png"), ("--inpaint", "folder", "--mask", "mask.png")
JUMPS, GUIDED = (*FILL, "--sampler", "ddpm", "--jump-length", 2, "--jump-n-sample", 2), ("--guidance", 2)
SAMPLING = {
    "model": Drawn(("--model", "other"), lambda f: {"model": "other"}),
    "network": Refused(("--network", "torch.nn:Identity"), "network: got torch.nn:Identity, but pets is a UNet2DModel"),
    "num": Drawn(("--num", 3), lambda f: {"count": 3}),
    "seed": Drawn(("--seed", 5), lambda f: {"rng": Philox(5)}),
    "classes": Drawn(("--class", "hen,0"), lambda f: {"labels": (2, 0)}),
    "guidance": Drawn(GUIDED, lambda f: f.guided(2)),
    "guidance_rescale": Drawn(("--guidance-rescale", 0.7), lambda f: f.guided(2, rescale=0.7), GUIDED),
    "guidance_interval": Drawn(("--guidance-interval", 20, 60), lambda f: f.guided(2, interval=(20, 60)), GUIDED),
    "null_class": Drawn(("--null-class", 1), lambda f: f.guided(2, 1), GUIDED),
    "sampler": Drawn(("--sampler", "dpmpp_2m"), lambda f: {"sampler": "dpmpp_2m"}),
    "table": Drawn(("--table", "table.json"), lambda f: {"sampler": f.table, "steps": None}, steps=()),
    "steps": Drawn(("--steps", 5), lambda f: {"steps": 5}),
    "spacing": Drawn(("--spacing", "linspace"), lambda f: {"spacing": "linspace"}),
    "eta": Drawn(("--eta", 0.5), lambda f: {"eta": 0.5}),
    "clip": Drawn(("--clip", -0.5, 0.25), lambda f: {"clip_denoised": (-0.5, 0.25)}),
    "no_clip": Drawn(("--no-clip",), lambda f: {"clip_denoised": False}),
    "threshold": Drawn(("--threshold", 0.9), lambda f: {"clip_denoised": DynamicThreshold(0.9)}),
    "threshold_max": Drawn(
        ("--threshold-max", 1.1), lambda f: {"clip_denoised": DynamicThreshold(0.9, 1.1)}, ("--threshold", 0.9)
    ),
    "start": [
        Drawn(("--start", name, *HALF), lambda f, which=which: {"start": f.images[which], "strength": 0.5})
        for name, which in (
            ("images.npz", [0, 1]),
            ("images.npy", [0, 1]),
            ("folder", [0, 1]),
            ("folder/b.png", [1, 1]),
        )
    ],
    "strength": Drawn(("--strength", 0.5), lambda f: {"start": f.images[:2], "strength": 0.5}, START),
    "to": Drawn(
        TO, lambda f: f.path(torch.tensor([0.0, 1.0])) | {"rng": Philox(0, sample_ids=torch.zeros(2).long())}, START
    ),
    "weight": Drawn(("--weight", 0.25), lambda f: f.path(0.25), (*START, *TO)),
    "mix": Drawn(("--mix", "lerp"), lambda f: f.path(0.4, "lerp"), (*START, *TO, "--weight", 0.4)),
    "noise": Drawn(("--noise", "noise.npy"), lambda f: {"noise": f.noise[:2]}),
    "inpaint": Drawn(FILL, lambda f: f.fill()),
    "mask": Drawn(("--mask", "right.png"), lambda f: {"inpaint": Inpaint(f.images[:2], ~f.left)}, FILL),
    "jump_n_sample": Drawn(
        ("--jump-n-sample", 3), lambda f: {"sampler": "ddpm"} | f.fill(jump_length=2, jump_n_sample=3), JUMPS
    ),
    "jump_length": Drawn(
        ("--jump-length", 1), lambda f: {"sampler": "ddpm"} | f.fill(jump_length=1, jump_n_sample=2), JUMPS
    ),
    "device": [
        Same(("--device", "cpu"), "the tests run there"),
        Refused(("--device", "gpu"), "device: got gpu, expected cuda for a GPU, or cpu"),
    ],
    "dtype": Drawn(("--dtype", "bfloat16"), lambda f: {"dtype": torch.bfloat16}),
    "backend": Same(("--backend", "reference"), "plain torch has the same equations"),
    "autocast": Drawn(("--autocast", "bfloat16"), lambda f: {"autocast": torch.bfloat16}),
    "channels_last": Same(("--channels-last",), "a layout of the weights"),
    "quiet": Same(("--quiet",), "it shows no bar"),
}


def features(images):
    """Features of images for `ddpm-ext score`: the first eight numbers of each image."""
    return images.flatten(1)[:, :8]
