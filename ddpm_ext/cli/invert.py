"""`ddpm-ext invert`: computes the noise from which the sampler ddim makes given images."""

from __future__ import annotations

import argparse

import numpy as np

from ddpm_ext.base import files
from ddpm_ext.cli.arguments import Subparsers, add_command, check_ending
from ddpm_ext.cli.images import IMAGES, read_images
from ddpm_ext.cli.loop_inputs import add_clip, clip_of, running_of
from ddpm_ext.cli.sampling import are_finite, load, refuse_not_finite
from ddpm_ext.cli.sampling_options import add_class, add_model, add_running, add_spacing
from ddpm_ext.loop.inversion import inversion_table
from ddpm_ext.plots.style import plural

_EXAMPLES = """examples:
  ddpm-ext invert photo.png --model my-run --steps 100 --out noise.npy
  ddpm-ext sample --noise noise.npy --no-clip --model my-run --sampler ddim --steps 100 --out again.png"""


def add_parser(commands: Subparsers) -> None:
    description = (
        "Goes from images up to the noise from which the sampler ddim, with the same steps and spacing and without a "
        "clip,\ncomes back to them. The more steps, the closer."
    )
    parser = add_command(commands, "invert", description, takes="FILES ", epilog=_EXAMPLES)
    parser.add_argument("images", metavar="FILES", help=IMAGES)
    group = parser.add_argument_group("how to invert")
    add_model(group)
    add_class(group, "all")
    add_spacing(group)
    add_clip(group, threshold=False, clips=False)
    add_running(parser, batches="images at a time")
    add = parser.add_argument_group("output").add_argument
    kinds = "ends in .npy: float32 (num, channels, height, width), which ddpm-ext sample --noise takes"
    add("--out", default="noise.npy", metavar="FILE", help=kinds)


def run(options: argparse.Namespace) -> None:
    """Writes the noise to the file `options.out`."""
    check_ending(options.out, (".npy",))
    loaded = load(options)
    table = inversion_table(loaded.diffusion, options.steps, options.spacing)
    images = read_images(options.images, loaded.model.shape, "images").to(loaded.device, loaded.dtype)
    files.check_writable(options.out)
    arrays, not_finite = [], 0
    for first in range(0, len(images), options.batch_size):
        batch = images[first : first + options.batch_size]
        noise = loaded.last_samples(
            loaded.model.unet,
            tuple(batch.shape),
            progress=not options.quiet,
            sampler=table,
            noise=batch,
            clip_denoised=clip_of(options),
            model_kwargs=loaded.model_kwargs(range(first, first + len(batch))),
            rng=None,
            **running_of(options),
        )
        not_finite += are_finite(noise).count(False)
        arrays.append(noise.float().cpu().numpy())
    files.write_array(options.out, np.concatenate(arrays))
    print(f"{options.out}: noise of {plural(len(images), 'image')}, after {plural(len(table), 'step')}")
    refuse_not_finite(not_finite, len(images), options.out)
