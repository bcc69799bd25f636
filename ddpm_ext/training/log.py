"""The log of a training run: losses.csv with a line for each step, and trackers that get means of several lines."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddpm_ext.base import files
from ddpm_ext.training.trackers import Tracker
from ddpm_ext.version import __version__

QUARTERS = tuple(f"loss_q{quarter}" for quarter in range(4))
"""Columns of losses.csv: the mean loss in each quarter of the timesteps. The first quarter has the least noise."""
_HEADER = f"step,loss,grad_norm,lr,images_per_second,{','.join(QUARTERS)}\n"


class LogRow(NamedTuple):
    """One training step.

    step: the step's number, from 1.
    norm: the norm of the gradient before the gradient was clipped.
    sums, counts: for each quarter of the timesteps, the sum of its samples' losses and the number of its samples.
    """

    step: int
    loss: float
    norm: float
    lr: float
    sums: tuple[float, ...]
    counts: tuple[float, ...]


def quarter_means(rows: list[LogRow]) -> list[float]:
    """The mean loss of the rows' samples in each quarter of the timesteps; NaN for a quarter without samples."""
    means = []
    for quarter in range(len(QUARTERS)):
        count = sum(row.counts[quarter] for row in rows)
        means.append(sum(row.sums[quarter] for row in rows) / count if count else math.nan)
    return means


class Log:
    """The file losses.csv of a run, and the run's trackers.

    Lines of steps after `step` are removed from the file. A killed run may have written them.

    Args:
        folder: the run's folder.
        step: how many steps the run has taken.
        trackers: objects that receive scores, pictures and, from each call of `write`, the mean losses of its steps.
            `close` closes them.

    Raises:
        OSError: a file can't be written; the message is one sentence.
    """

    def __init__(self, folder: Path, step: int, trackers: Sequence[Tracker]) -> None:
        self.path, self.trackers = folder / "losses.csv", trackers
        earlier = [f"{','.join(row)}\n" for row in _whole_lines(self.path) if int(row[0]) <= step] if step else []
        with files.errors_name("losses", self.path):
            files.write_text(self.path, _HEADER + "".join(earlier))

    def write(self, rows: list[LogRow], images_per_second: float) -> None:
        """Appends a line for each row to the file, waits until the lines are on the disk, and informs the trackers.

        The trackers get the mean losses of the rows, the gradient's norm and the learning rate of the last row, and
        `images_per_second`. Without rows, they get nothing.
        """
        with files.errors_name("losses", self.path), open(self.path, "a", encoding="utf-8") as opened:
            for row in rows:
                quarters = ",".join(f"{mean:.6g}" for mean in quarter_means([row]))
                opened.write(
                    f"{row.step},{row.loss:.9g},{row.norm:.6g},{row.lr:.6g},{images_per_second:.1f},{quarters}\n"
                )
            opened.flush()
            os.fsync(opened.fileno())
        if not rows:
            return
        last, means = rows[-1], dict(zip(QUARTERS, quarter_means(rows), strict=True))
        numbers = {
            "loss": sum(row.loss for row in rows) / len(rows),
            "gradient norm": last.norm,
            "learning rate": last.lr,
            "images per second": images_per_second,
            **{name: mean for name, mean in means.items() if not math.isnan(mean)},
        }
        for tracker in self.trackers:
            tracker.numbers(numbers, last.step)

    def close(self) -> None:
        """Closes the trackers."""
        for tracker in self.trackers:
            tracker.close()


def read_losses(path: Path) -> list[float]:
    """The losses in a losses.csv, up to the first incomplete line; empty if the file can't be read."""
    return [float(row[1]) for row in _whole_lines(path)]


def read_quarters(path: Path) -> list[list[float]]:
    """The losses in a losses.csv in each quarter of the timesteps, (steps, 4); NaN where a quarter had no sample."""
    return [[float(value) for value in row[-len(QUARTERS) :]] for row in _whole_lines(path)]


def curve_title(options: Mapping[str, Any]) -> str:
    """The title of the loss curve of a run with these options."""
    weighting = "" if options["weighting"] == "simple" else f", weighting {options['weighting']}"
    return f"Training loss: {options['loss']} of {options['prediction']}{weighting}"


def _whole_lines(path: Path) -> list[list[str]]:
    """The values in the lines of a losses.csv, up to the first incomplete line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, ValueError):
        return []
    rows: list[list[str]] = []
    for text in lines[1:] if lines[:1] == [_HEADER] else []:
        row = text.rstrip("\n").split(",")
        if not text.endswith("\n") or len(row) != _HEADER.count(",") + 1 or not row[0].isdecimal():
            break
        rows.append(row)
    return rows


def progress_line(rows: list[LogRow], step: int, steps: int, lr: float, images_per_second: float) -> str:
    """The line of text that reports a run's progress.

    It has the step, the mean loss of `rows`, the mean loss in each quarter of the timesteps, the learning rate and the
    images per second.
    """
    mean = sum(row.loss for row in rows) / len(rows) if rows else math.nan
    quarters = " ".join(f"{mean:.4f}" for mean in quarter_means(rows))
    return f"step {step:>6}/{steps}  loss {mean:.4f} ({quarters})  lr {lr:.2e}  {images_per_second:.1f} images/s"


def final_steps(steps: int) -> int:
    """The number of last steps over which a run's final loss is averaged: a tenth of all steps, rounded up."""
    return -(-steps // 10)


def final_loss(losses: list[float]) -> float:
    """The mean loss of the last tenth of the steps; NaN if there are no losses."""
    last = losses[-final_steps(len(losses)) :]
    return sum(last) / len(last) if last else math.nan


def versions() -> dict[str, str]:
    """The versions of Python and of the packages on which a run's numbers depend."""
    versions_of = {"python": platform.python_version(), "ddpm-ext": __version__, "torch": torch.__version__}
    for package in ("diffusers", "numpy", "scikit-learn"):
        with suppress(metadata.PackageNotFoundError):
            versions_of[package] = metadata.version(package)
    return versions_of
