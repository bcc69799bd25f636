"""`ddpm-ext sample`: draws samples into one file with --num; with --num-images, sample_many.py does the work."""

from __future__ import annotations

import argparse

import numpy as np

from ddpm_ext import plots
from ddpm_ext.base import files
from ddpm_ext.base import ranks as distributed
from ddpm_ext.cli import sample_many
from ddpm_ext.cli.arguments import Subparsers, add_command, check_ending
from ddpm_ext.cli.sampling import are_finite, draw, prepare, refuse_not_finite
from ddpm_ext.cli.sampling_options import add_sampling
from ddpm_ext.cli.settings import as_arrays, settings_of
from ddpm_ext.plots.style import plural

_ENDINGS = (".npz", ".png")
_EXAMPLES = """examples:
  ddpm-ext sample --num 64 --out digits.png
  ddpm-ext sample --model my-run --sampler ddim --steps 50 --spacing trailing --seed 7 --out mine.png
  ddpm-ext sample --model shapes --class star,moon --guidance 2.5 --num 16 --out stars.png
  ddpm-ext sample --num-images 50000 --device cuda --out samples --npz
  torchrun --nproc-per-node 8 -m ddpm_ext sample --num-images 50000 --device cuda --out samples --npz"""


def add_parser(commands: Subparsers) -> None:
    """Adds `sample` to the commands of ddpm-ext."""
    summary = "draw samples into an .npz, a picture or a folder"
    parser = add_command(commands, "sample", summary, "Draws samples from a model.", epilog=_EXAMPLES)
    kinds = (
        "with --num .npz: arr_0, uint8, (num, height, width, channels), and arr_1, classes, as guided-diffusion's "
        "scripts write them, and the options by name; or .png: a grid (default: samples.npz); with --num-images a "
        "folder (default: samples)"
    )
    add_output = add_sampling(parser, num=256, out=None, out_help=kinds, by_ranks=True)
    sample_many.add_options(add_output)


def run(options: argparse.Namespace) -> None:
    """Writes `options.num` samples to the file `options.out`, or `options.num_images` to a folder."""
    if options.num_images is not None:
        sample_many.run(options)
        return
    for name in ("npz", "png"):
        if getattr(options, name) not in (None, False):
            raise ValueError(f"{name}: belongs to --num-images; with --num the ending of --out chooses the format")
    if distributed.ranks().size > 1:
        raise ValueError("num: draws in one process, expected --num-images among several ranks")
    out = options.out or "samples.npz"
    ending = check_ending(out, _ENDINGS)
    prepared = prepare(options, pictures=ending == ".png")
    files.check_writable(out)
    batches = range(0, options.num, options.batch_size)
    pictures, wrong = [], 0
    for first in batches:
        count = min(options.batch_size, options.num - first)
        if len(batches) > 1 and not options.quiet:
            which = f"samples {first} to {first + count - 1}" if count > 1 else f"sample {first}"
            print(f"{which} of {options.num}")
        samples = draw(prepared, options, first, count)
        wrong += are_finite(samples).count(False)
        pictures.append(plots.to_uint8(samples))
    images = np.concatenate(pictures)
    if ending == ".npz":
        labels = prepared.labels(range(options.num))
        arrays = {"arr_0": images} | ({} if labels is None else {"arr_1": labels.numpy()})
        with files.atomic_path(out) as beside, open(beside, "wb") as opened:
            np.savez(opened, **arrays, **as_arrays(settings_of(options, prepared)))  # type: ignore[arg-type]
    else:
        plots.save_picture(plots.grid(images), out)
    print(f"{out}: {plural(len(images), 'sample')}, {'x'.join(map(str, images.shape[1:]))}")
    refuse_not_finite(wrong, len(images), out)
