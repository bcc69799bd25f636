"""Snapshots of a run's power averages (power_average.py), from which averages of other lengths are computed later."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm_ext.models.stored import check_finite, read_weights, write_weights
from ddpm_ext.training.load_run import Trained, load
from ddpm_ext.training.power_average import LONGEST, combination

SNAPSHOTS = "snapshots"
_NAME = re.compile(r"step-(\d{8,})-length-(0\.\d+)\.safetensors")


def write_snapshots(folder: Path, step: int, averages: Mapping[float, nn.Module]) -> None:
    """Writes the state dict of each average after a step. averages: the modules, by their lengths."""
    for length, average in averages.items():
        write_weights(average, folder / SNAPSHOTS / f"step-{step:08d}-length-{length:.2f}.safetensors", torch.float32)


def remove_later(folder: Path, step: int) -> None:
    """Removes the snapshots of steps after `step`, and the temporary files of a killed run.

    step: the step from which the run continues. It will write the later snapshots again.
    """
    for path in (folder / SNAPSHOTS).glob("*.safetensors"):
        match = _NAME.fullmatch(path.name)
        if path.name.startswith(".step-") or (match and int(match[1]) > step):
            path.unlink()


@dataclass(frozen=True)
class PostHocAverage:
    """A model whose weights are an average that was computed after training.

    trained: the model, as training.load returns it.
    step: the training step at which the average ends.
    snapshots: the number of snapshots that it was computed from.
    distance: how far the average is from the exact average of its length. A profile is the factors with which an
        average sums the weights of all steps. The distance is the norm of the difference between this average's profile
        and the exact one, divided by the exact profile's norm.

    Examples:
        >>> from ddpm_ext.training import post_hoc_average
        >>> average = post_hoc_average("averaged-run", 0.15)  # doctest: +SKIP
        >>> average.trained.sample(4, sampler="ddim", steps=5)  # doctest: +SKIP
    """

    trained: Trained
    step: int
    snapshots: int
    distance: float


def post_hoc_average(
    run: str | os.PathLike[str], length: float, model: nn.Module | None = None, *, device: torch.device | str = "cpu"
) -> PostHocAverage:
    """Computes an average of a run's weights, of any length, from the snapshots that `snapshot_every` wrote.

    This is the post-hoc EMA of Karras et al. 2024, section 3.2: the weighted sum of snapshots that is nearest, in least
    squares, to the average of this length.

    Args:
        run: the folder of the run, which may be still running.
        length: the standard deviation of the average's steps as a share of the training so far (sigma_rel in the
            paper), above 0 and at most 0.288, which is about the plain mean of all steps.
        model, device: see training.load.

    Raises:
        ValueError: the length is out of range, or the run has no snapshots; see also training.load.
        MissingExtra: diffusers or safetensors is not installed.

    Examples:
        >>> from ddpm_ext.training import TrainOptions, post_hoc_average, train
        >>> options = TrainOptions(data="shapes", steps=4, batch_size=4, widths=(8, 8), attention=(), groups=4)
        >>> result = train(options, "averaged-run", snapshot_every=1)
        17,899 parameters, 65,536 images of shape (3, 16, 16), on ...
        step      4/4  loss ...
        averaged-run is the folder of a DDPMPipeline, which ddpm-ext sample and diffusers can read
        >>> average = post_hoc_average("averaged-run", 0.15)
        >>> average.step, average.snapshots
        (4, 8)
        >>> samples = average.trained.sample(4, sampler="ddim", steps=5)
    """
    if not 0 < length <= LONGEST:
        raise ValueError(f"length: got {length}, expected a number above 0 and up to {LONGEST}")
    trained, folder = load(run, model, device=device), Path(run) / SNAPSHOTS
    snapshots = [(match, path) for path in sorted(folder.glob("*")) if (match := _NAME.fullmatch(path.name))]
    if not snapshots:
        raise ValueError(f"run: {run} has no snapshots, expected a run with --snapshot-every, or snapshot_every=")
    steps, lengths = [int(match[1]) for match, _ in snapshots], [float(match[2]) for match, _ in snapshots]
    factors, distance = combination(steps, lengths, max(steps), length)
    parameters = dict(trained.model.named_parameters())
    sums = {name: torch.zeros(value.shape, dtype=torch.float64, device="cpu") for name, value in parameters.items()}
    for factor, (_, path) in zip(factors.tolist(), snapshots, strict=True):
        weights = read_weights(path)
        for name, total in sums.items():
            total.add_(_checked(weights.get(name), total, path, name), alpha=factor)
    for name, total in sums.items():
        parameters[name].copy_(total)  # buffers keep the values that load() has read
    check_finite(trained.model, folder)
    return PostHocAverage(trained, max(steps), len(snapshots), distance)


def _checked(value: Tensor | None, total: Tensor, path: Path, name: str) -> Tensor:
    """Converts a snapshot's weights to float64. Raises ValueError unless they have the shape of `total`."""
    if value is None or value.shape != total.shape:
        raise ValueError(f"run: {path} holds weights of another model: {name} differs")
    return value.double()
