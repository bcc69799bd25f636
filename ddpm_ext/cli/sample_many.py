"""`ddpm-ext sample --num-images`: what ddpm_ext.many does, with the command line's options."""

from __future__ import annotations

import argparse
import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ddpm_ext
from ddpm_ext import plots
from ddpm_ext.base import files
from ddpm_ext.base import ranks as distributed
from ddpm_ext.bulk.export import check_png_folder, write_npz, write_pngs
from ddpm_ext.bulk.run import sample_many
from ddpm_ext.bulk.shards import Shards
from ddpm_ext.cli import commands
from ddpm_ext.models.folder import CONFIG, WEIGHTS, LoadedModel
from ddpm_ext.tables.samplers import SAMPLERS, WITH_ETA

__all__ = ["run"]


def run(options: argparse.Namespace) -> None:
    """Draws what is missing of `options.num_images` samples in the folder `options.out`, with the other ranks."""
    folder = Path(options.out or "samples")
    if folder.suffix.lower() in (".npz", ".png"):
        raise ValueError(f"out: got {folder}, expected a folder for --num-images; --npz and --png write files too")
    with distributed.join() as ranks:
        options.device = ranks.device(options.device)
        if commands.check_device(options.device).type == "cuda":
            torch.cuda.set_device(options.device)  # a model's own kernels go by it
        model, diffusion, rows = commands.prepare(options, pictures=options.png)
        channels, height, width = model.shape
        shards = Shards(folder, options.num_images, options.shard_size, (height, width, channels))
        npz, png = _npz_path(options, shards), folder / "png"

        def check_outputs() -> None:
            if options.npz is not None:
                if npz.suffix.lower() != ".npz":
                    raise ValueError(f"npz: got {npz}, expected a name that ends in .npz")
                files.check_writable(npz)
            if options.png:
                check_png_folder(shards, png)

        ranks.share(check_outputs)
        work = sample_many(
            shards,
            _settings(options, model, rows),
            lambda first, count: plots.to_uint8(commands.draw(model, diffusion, options, first, count, progress=False)),
            batch_size=options.batch_size,
            ranks=ranks,
            about={"model": options.model, "torch": torch.__version__},
            progress=not options.quiet,
        )
    if ranks.rank != 0:
        return
    done = f"{folder}: {shards.count} samples, {_by(shards.shape)}"
    if work.drawn:
        done += f"; {work.drawn} drawn in {work.seconds:.1f} s, {work.drawn / work.seconds:.1f} images/s"
        done += f" on {ranks.size} ranks" if ranks.size > 1 else ""
    print(done, flush=True)
    if options.npz is not None:
        write_npz(shards, npz)
        print(npz, flush=True)
    if options.png:
        write_pngs(shards, png)
        print(png, flush=True)


def _settings(options: argparse.Namespace, model: LoadedModel, rows: int) -> dict[str, Any]:
    """What samples follow from, but for their ids."""
    eta = None
    if options.sampler in WITH_ETA:
        default = inspect.signature(SAMPLERS[options.sampler]).parameters["eta"].default
        eta = default if options.eta is None else options.eta
    return {
        "version": ddpm_ext.__version__,
        "model_sha256": _model_hash(model),
        "sampler": options.sampler,
        "steps": rows,
        "spacing": options.spacing,
        "eta": eta,
        "seed": options.seed,
        "dtype": options.dtype,
        "backend": options.backend,
    }


def _model_hash(model: LoadedModel) -> str:
    """Of architecture, weights and diffusion, wherever the folder is."""
    digest = hashlib.sha256(repr(model.settings).encode())
    inner = model.folder / "unet" if (model.folder / "unet").is_dir() else model.folder
    for name in (CONFIG, WEIGHTS):
        with open(inner / name, "rb") as opened:
            while block := opened.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def _npz_path(options: argparse.Namespace, shards: Shards) -> Path:
    """By default inside the folder, with the name that guided-diffusion gives it."""
    name = f"samples_{_by((shards.count, *shards.shape))}.npz"
    return Path(options.npz) if options.npz else shards.folder / name


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
