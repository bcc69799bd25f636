"""What a training run leaves beside its weights for people to read: a line a step, pictures, and how it was made."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext import __version__
from ddpm_ext.base import files
from ddpm_ext.base.optional import MissingExtra

if TYPE_CHECKING:
    from ddpm_ext.training import Result, TrainOptions

__all__ = ["Log", "Row", "final_loss", "line", "require_tensorboard", "versions", "write_training"]

_FINAL = 500
_HEADER = "step,loss,grad_norm,lr,images_per_second\n"


class Row(NamedTuple):
    """A step's numbers: `step` counts from 1, `norm` is the gradient's before it was clipped."""

    step: int
    loss: float
    norm: float
    lr: float


class Log:
    """A run's losses.csv, a line a step, and its TensorBoard events where asked for.

    Opened at a step, it goes on from there: later lines, which a killed run may have left, are removed.

    Raises OSError, in one sentence, if a file can't be written.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool = False) -> None:
        self.path = folder / "losses.csv"
        kept = [f"{','.join(row)}\n" for row in _rows(self.path) if int(row[0]) <= step] if step else []
        with _in_one_sentence(self.path):
            files.write_text(self.path, _HEADER + "".join(kept))
        self._writer: Any = None
        if tensorboard:
            require_tensorboard()
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, rows: list[Row], images_per_second: float) -> None:
        """Adds lines; they are on the disk when it returns."""
        with _in_one_sentence(self.path), open(self.path, "a", encoding="utf-8") as opened:
            for row in rows:
                opened.write(f"{row.step},{row.loss:.9g},{row.norm:.6g},{row.lr:.6g},{images_per_second:.1f}\n")
            opened.flush()
            os.fsync(opened.fileno())
        if self._writer is not None and rows:
            step = rows[-1].step
            self._writer.add_scalar("loss", sum(row.loss for row in rows) / len(rows), step)
            self._writer.add_scalar("gradient norm", rows[-1].norm, step)
            self._writer.add_scalar("learning rate", rows[-1].lr, step)
            self._writer.add_scalar("images per second", images_per_second, step)
            self._writer.flush()

    def pictures(self, samples: Tensor, step: int) -> None:
        """Adds samples (count, channels, height, width) in [-1, 1] to the events."""
        if self._writer is not None:
            self._writer.add_images("samples", (samples.float().cpu().clamp(-1, 1) + 1) / 2, step)

    def losses(self) -> list[float]:
        """Of all steps that are written, in order."""
        return [float(row[1]) for row in _rows(self.path)]

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@contextmanager
def _in_one_sentence(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"losses: cannot write {path}: {error.strerror or error}") from error


def _rows(path: Path) -> list[list[str]]:
    """The lines of a losses.csv up to the first that is not whole."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, ValueError):
        return []
    rows: list[list[str]] = []
    for text in lines[1:] if lines[:1] == [_HEADER] else []:
        row = text.rstrip("\n").split(",")
        if len(row) != _HEADER.count(",") + 1 or not row[0].isdecimal():
            break
        rows.append(row)
    return rows


def require_tensorboard() -> None:
    """Raises MissingExtra, with the pip command, if TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise MissingExtra("tensorboard: writing its events needs tensorboard: pip install tensorboard")


def line(losses: list[float], step: int, steps: int, lr: float, images_per_second: float) -> str:
    """One line of progress: the step, the mean of the losses since the last line, learning rate, images a second."""
    mean = sum(losses) / len(losses) if losses else math.nan
    return f"step {step:>6}/{steps}  loss {mean:.4f}  lr {lr:.2e}  {images_per_second:.1f} images/s"


def final_loss(losses: list[float]) -> float:
    """The mean over the last 500 steps; NaN if there are none."""
    last = losses[-_FINAL:]
    return sum(last) / len(last) if last else math.nan


def versions() -> dict[str, str]:
    """What the numbers of a run depend on, with versions."""
    found = {"python": platform.python_version(), "ddpm-ext": __version__, "torch": torch.__version__}
    for package in ("diffusers", "numpy", "scikit-learn"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_training(folder: Path, options: TrainOptions, result: Result, about: dict[str, Any]) -> None:
    """Writes training.json: options, versions, number of parameters, final loss, seconds, and what `about` says."""
    final = round(result.final_loss, 6) if math.isfinite(result.final_loss) else None
    content = {
        **about,
        "options": asdict(options),
        "versions": versions(),
        "parameters": result.parameters,
        "final_loss": final,
        "final_loss_over_steps": min(_FINAL, options.steps),
        "seconds": round(result.seconds, 1),
        "threads": torch.get_num_threads(),
    }
    files.write_json(folder / "training.json", content)
