"""`ddpm-ext sample`: draws samples, with --num into one file, or with --num-images into a folder, which ranks share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddpm_ext import plots
from ddpm_ext.base import files
from ddpm_ext.base import ranks as distributed
from ddpm_ext.base.optional import has_bars
from ddpm_ext.bulk.export import check_png_folder, write_npz, write_pngs
from ddpm_ext.bulk.run import sample_many
from ddpm_ext.bulk.shards import SHARD_SIZE, Pixels, Shards
from ddpm_ext.cli.arguments import Subparsers, add_command, check_device, check_ending, check_out, eta_of, whole_number
from ddpm_ext.cli.chosen_tables import table_hash
from ddpm_ext.cli.network import model_hash
from ddpm_ext.cli.sampling import Prepared, are_finite, draw, prepare, refuse_not_finite, tell_choice
from ddpm_ext.cli.sampling_options import add_sampling
from ddpm_ext.plots.style import plural
from ddpm_ext.tables.spacing import DEFAULT_SPACING
from ddpm_ext.version import __version__

_ENDINGS = (".npz", ".png")
_EXAMPLES = """examples:
  ddpm-ext sample --num 64 --out digits.png
  ddpm-ext sample --model my-run --sampler ddim --steps 50 --spacing trailing --seed 7 --out mine.png
  ddpm-ext sample --model shapes --class star,moon --guidance 2.5 --num 16 --out stars.png
  ddpm-ext sample --num-images 50000 --device cuda --out samples --npz
  torchrun --nproc-per-node 8 -m ddpm_ext sample --num-images 50000 --device cuda --out samples --npz"""


def add_parser(commands: Subparsers) -> None:
    parser = add_command(commands, "sample", "Draws samples from a model.", epilog=_EXAMPLES)
    kinds = (
        "with --num .npz: arr_0, uint8, (num, height, width, channels), and arr_1, classes, as guided-diffusion's "
        "scripts write them, and the options by name; or .png: a grid (default: samples.npz); with --num-images a "
        "folder (default: samples)"
    )
    add = add_sampling(parser, num=256, out=None, out_help=kinds, by_ranks=True)
    npz = "also write an .npz, for guided-diffusion's evaluator (default: FOLDER/samples_NxHxWxC.npz)"
    add("--npz", nargs="?", const="", metavar="FILE", help=f"with --num-images: {npz}")
    png = "also write FOLDER/png/000000.png and so on, for torch-fidelity"
    add("--png", action="store_true", help=f"with --num-images: {png}")
    size = "samples in each file, and the most that a batch can have"
    add("--shard-size", type=whole_number(1), default=SHARD_SIZE, metavar="N", help=f"with --num-images: {size}")


def run(options: argparse.Namespace) -> None:
    """Writes `options.num` samples to the file `options.out`, or `options.num_images` to a folder."""
    if options.num_images is not None:
        _run_many(options)
        return
    for name in ("npz", "png"):
        if getattr(options, name) not in (None, False):
            raise ValueError(f"{name}: belongs to --num-images; with --num the ending of --out chooses the format")
    if distributed.ranks().size > 1:
        raise ValueError("num: draws in one process, expected --num-images among several ranks")
    out = options.out or "samples.npz"
    ending = check_ending(out, _ENDINGS)
    prepared = prepare(options, pictures=ending == ".png", latents=True)
    files.check_writable(out)
    tell_choice(prepared, options)
    batches = range(0, options.num, options.batch_size)
    pictures, not_finite_count = [], 0
    for first in batches:
        count = min(options.batch_size, options.num - first)
        if len(batches) > 1 and not options.quiet:
            which_samples = f"samples {first} to {first + count - 1}" if count > 1 else f"sample {first}"
            print(f"{which_samples} of {options.num}")
        samples = draw(prepared, options, first, count)
        not_finite_count += are_finite(samples).count(False)
        pictures.append(plots.to_uint8(samples))
    images = np.concatenate(pictures)
    if ending == ".npz":
        labels = prepared.labels(range(options.num))
        arrays = {"arr_0": images} | ({} if labels is None else {"arr_1": labels.numpy()})
        with files.atomic_path(out) as temporary, open(temporary, "wb") as opened:
            np.savez(opened, **arrays, **as_arrays(settings_of(options, prepared)))  # type: ignore[arg-type]
    else:
        plots.save_picture(plots.grid(images), out)
    print(f"{out}: {plural(len(images), 'sample')}, {'x'.join(map(str, images.shape[1:]))}")
    refuse_not_finite(not_finite_count, len(images), out)


def _run_many(options: argparse.Namespace) -> None:
    """Draws samples by all ranks until the folder `options.out` has `options.num_images`. Writes --npz and --png."""
    folder = Path(options.out or "samples")
    if folder.suffix.lower() in (".npz", ".png"):
        raise ValueError(f"out: got {folder}, expected a folder for --num-images; --npz and --png write files too")
    with distributed.join() as ranks:
        options.device = ranks.device(options.device)
        if check_device(options.device).type == "cuda":
            torch.cuda.set_device(options.device)  # custom kernels in a user's model may use the current device
        prepared = prepare(options, pictures=options.png, latents=True)
        settings = settings_of(options, prepared)
        channels, height, width = prepared.model.image_shape
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
        tell_choice(prepared, options)
        try:
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
        except KeyboardInterrupt:
            raise KeyboardInterrupt(distributed.KEPT) from None
    if ranks.rank != 0:
        return
    summary = f"{folder}: {plural(shards.count, 'sample')}, {_by(shards.shape)}"
    if result.drawn:
        summary += f"; {result.drawn} drawn in {result.seconds:.1f} s, {result.drawn / result.seconds:.1f} images/s"
        summary += f" on {ranks.size} ranks" if ranks.size > 1 else ""
    print(summary, flush=True)
    if options.npz is not None:
        labels = prepared.labels(range(shards.count))
        write_npz(shards, npz, None if labels is None else labels.numpy(), as_arrays(settings))
        print(npz, flush=True)
        other_files = [] if options.npz else sorted(path.name for path in folder.glob("samples_*.npz") if path != npz)
        if other_files:
            print(f"{folder} also has {', '.join(other_files)}, of another number of samples", flush=True)
    if options.png:
        write_pngs(shards, png)
        print(png, flush=True)
    elif result.drawn and png.is_dir():
        print(f"{png} has fewer pictures than there are samples now; --png adds the others", flush=True)
    refuse_not_finite(result.not_finite, shards.count, folder)


def _npz_path(options: argparse.Namespace, shards: Shards) -> Path:
    """The path of --npz. The default is a file in the folder, with the name that guided-diffusion's scripts give it."""
    name = f"samples_{_by((shards.count, *shards.shape))}.npz"
    return Path(options.npz) if options.npz else shards.folder / name


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


# ------------------------------------------------------------------------------------ what determines the samples


def settings_of(options: argparse.Namespace, prepared: Prepared) -> dict[str, Any]:
    """The settings that, together with a sample's number, determine the sample."""
    class_settings: dict[str, Any] = {}
    if prepared.classes is not None:
        class_settings["classes"] = list(prepared.chosen) or f"all {len(prepared.classes.names)}"
        if options.guidance is not None:
            class_settings |= {"guidance": options.guidance, "null_class": prepared.classes.null}
    loop: dict[str, Any] = {"sampler": options.sampler, "steps": prepared.steps}
    loop |= {"spacing": options.spacing or DEFAULT_SPACING, "eta": eta_of(options.sampler, options.eta)}
    # A table is identified by its rows, no matter whether --table or --sampler tuned selected it.
    for table in prepared.tables.values():
        loop = {"sampler": "table", "steps": prepared.steps, "table_sha256": table_hash(table)}
    return {
        "version": __version__,
        "model_sha256": model_hash(prepared.model),
        **({} if prepared.model.decoder is None else {"vae_sha256": prepared.model.decoder.sha256()}),
        **loop,
        "seed": options.seed,
        "dtype": options.dtype,
        "backend": options.backend,
        **class_settings,
        **prepared.inputs.settings(options),
    }


def as_arrays(settings: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """The settings as small arrays for an .npz: numbers and texts have no dimensions, lists have one.

    Settings that are None are left out. No setting has a name that guided-diffusion's evaluator reads (arr_0, mu,
    sigma, mu_s, sigma_s).
    """
    return {name: np.asarray(value) for name, value in settings.items() if value is not None}
