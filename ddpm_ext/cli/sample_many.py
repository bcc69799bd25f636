"""`ddpm-ext sample --num-images`: many samples into a folder, by all ranks of torchrun, with ddpm_ext.bulk."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ddpm_ext import plots
from ddpm_ext.base import ranks as distributed
from ddpm_ext.base.optional import has_bars
from ddpm_ext.bulk.export import check_png_folder, write_npz, write_pngs
from ddpm_ext.bulk.run import sample_many
from ddpm_ext.bulk.shards import SHARD_SIZE, Pixels, Shards
from ddpm_ext.cli.arguments import check_device, check_out, whole_number
from ddpm_ext.cli.sampling import are_finite, draw, prepare, refuse_not_finite
from ddpm_ext.cli.settings import as_arrays, settings_of
from ddpm_ext.plots.style import plural


def add_options(add: Callable[..., argparse.Action]) -> None:
    """Adds the options of the output that belong to --num-images."""
    npz = "also write an .npz, for guided-diffusion's evaluator (default: FOLDER/samples_NxHxWxC.npz)"
    add("--npz", nargs="?", const="", metavar="FILE", help=f"with --num-images: {npz}")
    png = "also write FOLDER/png/000000.png and so on, for torch-fidelity"
    add("--png", action="store_true", help=f"with --num-images: {png}")
    size = "samples in each file, and the most that a batch can have"
    add("--shard-size", type=whole_number(1), default=SHARD_SIZE, metavar="N", help=f"with --num-images: {size}")


def run(options: argparse.Namespace) -> None:
    """Draws what the folder `options.out` lacks of `options.num_images` samples, together with the other ranks."""
    folder = Path(options.out or "samples")
    if folder.suffix.lower() in (".npz", ".png"):
        raise ValueError(f"out: got {folder}, expected a folder for --num-images; --npz and --png write files too")
    with distributed.join() as ranks:
        options.device = ranks.device(options.device)
        if check_device(options.device).type == "cuda":
            torch.cuda.set_device(options.device)  # a model's own kernels may launch on the current device
        prepared = prepare(options, pictures=options.png)
        settings = settings_of(options, prepared)
        channels, height, width = prepared.model.shape
        shards = Shards(folder, options.num_images, options.shard_size, (height, width, channels))
        npz, png = _npz_path(options, shards), folder / "png"

        def check_outputs() -> None:
            if options.npz is not None:
                check_out(str(npz), (".npz",), "npz")
            if options.png:
                check_png_folder(shards, png)

        not_finite: set[int] = set()

        def pixels(first: int, count: int) -> Pixels:
            samples = draw(prepared, options, first, count, progress=False)
            not_finite.update(first + i for i, finite in enumerate(are_finite(samples)) if not finite)
            return plots.to_uint8(samples)

        ranks.share(check_outputs)
        result = sample_many(
            shards,
            settings,
            pixels,
            batch_size=options.batch_size,
            ranks=ranks,
            about={"model": options.model, "torch": torch.__version__},
            progress=not options.quiet and has_bars(tell=ranks.rank == 0),
            not_finite=not_finite,
        )
    if ranks.rank != 0:
        return
    done = f"{folder}: {plural(shards.count, 'sample')}, {_by(shards.shape)}"
    if result.drawn:
        done += f"; {result.drawn} drawn in {result.seconds:.1f} s, {result.drawn / result.seconds:.1f} images/s"
        done += f" on {ranks.size} ranks" if ranks.size > 1 else ""
    print(done, flush=True)
    if options.npz is not None:
        labels = prepared.labels(range(shards.count))
        write_npz(shards, npz, None if labels is None else labels.numpy(), as_arrays(settings))
        print(npz, flush=True)
    if options.png:
        write_pngs(shards, png)
        print(png, flush=True)
    refuse_not_finite(result.not_finite, shards.count, folder)


def _npz_path(options: argparse.Namespace, shards: Shards) -> Path:
    """The path given with --npz; by default inside the folder, with the name that guided-diffusion gives it."""
    name = f"samples_{_by((shards.count, *shards.shape))}.npz"
    return Path(options.npz) if options.npz else shards.folder / name


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
