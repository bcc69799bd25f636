"""What the commands of `ddpm-ext` do, once their options are parsed."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ddpm_ext import plots
from ddpm_ext.base import files
from ddpm_ext.base import ranks as distributed
from ddpm_ext.base.optional import require
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import make_loop_rows
from ddpm_ext.models.folder import LoadedModel, load_model
from ddpm_ext.ops.noise import Philox
from ddpm_ext.plots.recorder import Recorder
from ddpm_ext.tables.samplers import WITH_ETA
from ddpm_ext.training import checkpoints

if TYPE_CHECKING:
    from ddpm_ext.diffusion import GaussianDiffusion

__all__ = ["check_device", "draw", "info", "prepare", "sample", "train", "trajectory"]

_SAMPLE_ENDINGS, _STRIP_ENDINGS = (".npz", ".png"), (".png", ".gif")
_STRIP_PICTURES, _GIF_PICTURES = 10, 60


def sample(options: argparse.Namespace) -> None:
    """Writes `options.num` samples to the file `options.out`."""
    for name in ("npz", "png"):
        if getattr(options, name) not in (None, False):
            raise ValueError(f"{name}: belongs to --num-images; with --num the ending of --out says it")
    if distributed.ranks().size > 1:
        raise ValueError("num: draws in one process, expected --num-images among several ranks")
    options.out = options.out or "samples.npz"
    ending = _ending(options.out, _SAMPLE_ENDINGS)
    model, diffusion, _ = prepare(options, pictures=ending == ".png")
    files.check_writable(options.out)
    batches = range(0, options.num, options.batch_size)
    pictures = []
    for first in batches:
        count = min(options.batch_size, options.num - first)
        if len(batches) > 1 and not options.quiet:
            print(f"samples {first} to {first + count - 1} of {options.num}")
        pictures.append(plots.to_uint8(draw(model, diffusion, options, first, count)))
    images = np.concatenate(pictures)
    if ending == ".npz":
        with files.atomic_path(options.out) as beside, open(beside, "wb") as opened:
            np.savez(opened, images)  # a nameless array is arr_0
    else:
        plots.save_picture(plots.grid(images), options.out)
    print(f"{options.out}: {len(images)} samples, {'x'.join(map(str, images.shape[1:]))}")


def trajectory(options: argparse.Namespace) -> None:
    """Writes x_t and the predicted x_0 along the loop to `options.out`."""
    ending = _ending(options.out, _STRIP_ENDINGS)
    model, diffusion, steps = prepare(options, pictures=True)
    files.check_writable(options.out)
    every = options.every or max(1, steps // (_STRIP_PICTURES if ending == ".png" else _GIF_PICTURES))
    recorder = Recorder(model.unet, every, steps, options.num)
    draw(model, diffusion, options, 0, options.num, recorder)
    moments = recorder.x_t, recorder.x_0, recorder.labels()
    if ending == ".gif":
        plots.save_gif(plots.trajectory_frames(*moments), options.out)
    else:
        plots.save_picture(plots.trajectory(*moments), options.out)
    print(f"{options.out}: {options.num} samples at {len(recorder.t)} of {steps} steps")


def train(options: argparse.Namespace, given: dict[str, Any], arguments: Sequence[str]) -> None:
    """Trains, or goes on with a run whose options are taken from its checkpoint where none are given."""
    from ddpm_ext import training

    check_device(options.device)
    names = {field.name for field in fields(training.TrainOptions)}
    chosen = {name: value for name, value in vars(options).items() if name in names}
    found = checkpoints.latest(Path(options.out), report=lambda text: None) if options.resume else None
    if found is None:
        wanted = training.TrainOptions(**chosen)
    else:
        was = found[1]["options"]
        wanted = training.with_defaults_of(was, {name: value for name, value in given.items() if name in names})
        check_device(wanted.device)
    command = shlex.join(["ddpm-ext", *arguments])
    result = training.train(
        wanted,
        options.out,
        resume=options.resume,
        command=command,
        report=lambda text: print(text, flush=True),
        progress=not options.quiet,
    )
    if distributed.ranks().rank == 0:
        print(
            f"{result.folder}: final loss {result.final_loss:.4f}, {result.parameters:,} parameters, "
            f"{result.seconds:.0f} s"
        )


def info(options: argparse.Namespace) -> None:
    """Prints how the extension was built and what it runs on."""
    from ddpm_ext import build_info

    rows = {str(name).replace("_", " "): value for name, value in _flat(build_info()).items()}
    rows["threads"] = torch.get_num_threads()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    rows["devices"] = ", ".join(["cpu", *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(count))])
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        print(f"{name:<{width}}  {'none' if value in (None, '') else value}")


def draw(
    model: LoadedModel,
    diffusion: GaussianDiffusion,
    options: argparse.Namespace,
    first: int,
    count: int,
    recorder: Recorder | None = None,
    *,
    progress: bool = True,
) -> torch.Tensor:
    """Samples `first` to `first + count - 1` of the seed: (count, channels, height, width), on the model's device."""
    with torch.no_grad():
        samples = diffusion.p_sample_loop(
            model.unet if recorder is None else recorder,
            (count, *model.shape),
            sampler=options.sampler,
            steps=options.steps,
            spacing=options.spacing,
            eta=options.eta,
            rng=Philox(options.seed, sample_ids=first),
            record="last",
            x0=recorder is not None,
            callback=None if recorder is None else recorder.keep,
            progress=progress and not options.quiet,
            device=check_device(options.device),
            dtype=getattr(torch, options.dtype),
        )
    assert isinstance(samples, torch.Tensor)  # what "last" gives
    return samples


def prepare(options: argparse.Namespace, *, pictures: bool) -> tuple[LoadedModel, GaussianDiffusion, int]:
    """Checks what can be checked before the work: the model, its diffusion, and how often a loop will call it."""
    device = check_device(options.device)
    if not options.quiet:
        require("tqdm", "the progress bar")
    if pictures:
        require("PIL.Image", "writing pictures")
    if options.sampler not in WITH_ETA and options.eta:
        raise ValueError(f"eta: got {options.eta}, but it belongs to --sampler {' or '.join(WITH_ETA)}")
    model = load_model(options.model, device=device, dtype=getattr(torch, options.dtype))
    diffusion = model.settings.diffusion(options.backend)
    chosen = LoopOptions(sampler=options.sampler, steps=options.steps, spacing=options.spacing, eta=options.eta)
    rows = make_loop_rows(diffusion.process, chosen)
    return model, diffusion, len(rows)


def _ending(out: str, expected: tuple[str, ...]) -> str:
    ending = Path(out).suffix.lower()
    if ending not in expected:
        raise ValueError(f"out: got {out}, expected a name that ends in {' or '.join(expected)}")
    return ending


def check_device(name: str) -> torch.device:
    """Raises ValueError, with the reason, unless tensors can be made there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"device: {name} can't be used here ({reason})") from error
    return device


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level of names; lists on one line."""
    rows: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            rows |= _flat(value, f"{prefix}{name} ")
        else:
            rows[prefix + name] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return rows
