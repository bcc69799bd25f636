"""What the commands of `ddpm-ext` do, once their options are parsed."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ddpm_ext import checkpoints, files, plots
from ddpm_ext.extras import require
from ddpm_ext.models import LoadedModel, load_model
from ddpm_ext.noise import Philox
from ddpm_ext.samplers import WITH_ETA
from ddpm_ext.trajectory import Recorder

if TYPE_CHECKING:
    from ddpm_ext.diffusion import GaussianDiffusion

__all__ = ["draw", "info", "sample", "train", "trajectory"]

_SAMPLE_ENDINGS, _STRIP_ENDINGS = (".npz", ".png"), (".png", ".gif")
_STRIP_PICTURES, _GIF_PICTURES = 10, 60


def sample(options: argparse.Namespace) -> None:
    """Writes `options.num` samples to `options.out`."""
    ending = _ending(options.out, _SAMPLE_ENDINGS)
    model, diffusion = _prepare(options)
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
    model, diffusion = _prepare(options)
    steps = options.steps or model.settings.timesteps
    every = options.every or max(1, steps // (_STRIP_PICTURES if ending == ".png" else _GIF_PICTURES))
    if model.unet.config.out_channels != model.unet.config.in_channels:
        raise ValueError("model: a learned variance is not supported here yet")
    recorder = Recorder(model.unet, diffusion, every, steps, options.num)
    draw(model, diffusion, options, 0, options.num, recorder)
    if ending == ".gif":
        plots.save_gif(_frames(recorder), options.out)
    else:
        titles = ("x_t", "predicted x_0")
        images = (recorder.x_t, recorder.x_0)
        halves = [
            plots.strips([plots.to_uint8(moment) for moment in moments], recorder.labels(), title)
            for moments, title in zip(images, titles, strict=True)
        ]
        plots.save_picture(np.concatenate(halves), options.out)
    print(f"{options.out}: {options.num} samples at {len(recorder.t)} of {steps} steps")


def train(options: argparse.Namespace, given: dict[str, Any], arguments: Sequence[str]) -> None:
    """Trains, or goes on with a run whose options are taken from its checkpoint where none are given."""
    from ddpm_ext import training

    _device(options.device)
    names = {field.name for field in fields(training.TrainOptions)}
    chosen = {name: value for name, value in vars(options).items() if name in names}
    wanted = training.TrainOptions(**chosen)
    newest = checkpoints.newest(Path(options.out))
    if options.resume and newest is not None:
        was = checkpoints.load(newest)[1]
        wanted = training.with_defaults_of(was, {name: value for name, value in given.items() if name in names})
    command = shlex.join(["ddpm-ext", *arguments])
    result = training.train(
        wanted, options.out, resume=options.resume, command=command, report=lambda text: print(text, flush=True)
    )
    print(
        f"{result.folder}: final loss {result.final_loss:.4f}, {result.parameters:,} parameters, {result.seconds:.0f} s"
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
    denoiser: Callable[..., Any] | None = None,
) -> torch.Tensor:
    """Samples `first` to `first + count - 1` of the seed: (count, channels, height, width), on the model's device."""
    with torch.no_grad():
        samples = diffusion.p_sample_loop(
            model.unet if denoiser is None else denoiser,
            (count, *model.shape),
            sampler=options.sampler,
            steps=options.steps,
            eta=options.eta,
            rng=Philox(options.seed, sample_ids=first),
            record="last",
            progress=not options.quiet,
            device=_device(options.device),
            dtype=getattr(torch, options.dtype),
        )
    assert isinstance(samples, torch.Tensor)  # what "last" gives
    return samples


def _prepare(options: argparse.Namespace) -> tuple[LoadedModel, GaussianDiffusion]:
    """Checks what can be checked before the work begins, and loads the model."""
    device = _device(options.device)
    if not options.quiet:
        require("tqdm", "the progress bar")
    if not options.out.lower().endswith(".npz"):
        require("PIL.Image", "writing pictures")
    if options.sampler not in WITH_ETA and options.eta:
        raise ValueError(f"eta: got {options.eta}, but it belongs to --sampler {' or '.join(WITH_ETA)}")
    model = load_model(options.model, device=device, dtype=getattr(torch, options.dtype))
    timesteps = model.settings.timesteps
    if options.steps is not None and options.steps > timesteps:
        raise ValueError(f"steps: got {options.steps}, expected at most {timesteps}, the timesteps of the model")
    diffusion = model.settings.diffusion(options.backend)
    files.check_writable(options.out)
    return model, diffusion


def _ending(out: str, expected: tuple[str, ...]) -> str:
    ending = Path(out).suffix.lower()
    if ending not in expected:
        raise ValueError(f"out: got {out}, expected a name that ends in {' or '.join(expected)}")
    return ending


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"device: {name} can't be used here ({reason})") from error
    return device


def _frames(recorder: Recorder) -> list[plots.Pixels]:
    """x_t on the left, the predicted x_0 on the right, labelled."""
    frames = []
    for label, noisy, clean in zip(recorder.labels(), recorder.x_t, recorder.x_0, strict=True):
        halves = [
            plots.strips([plots.grid(plots.to_uint8(images))[None]], [""], f"{name}, {label}", scale=1)
            for name, images in (("x_t", noisy), ("x_0", clean))
        ]
        frames.append(np.concatenate(halves, axis=1))
    return frames


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level of names; lists on one line."""
    rows: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            rows |= _flat(value, f"{prefix}{name} ")
        else:
            rows[prefix + name] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return rows
