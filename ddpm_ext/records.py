"""What a training run leaves beside its weights for people to read: losses and how it was made."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ddpm_ext import __version__, files

if TYPE_CHECKING:
    from ddpm_ext.training import Result, TrainOptions

__all__ = ["final_loss", "line", "versions", "write_losses", "write_training"]

_FINAL = 500


def line(losses: list[float], options: TrainOptions, lr: float, speed: float) -> str:
    """One line of progress: the step, the mean loss since the last line, learning rate, steps a second."""
    recent = losses[-options.log_every :]
    mean = sum(recent) / len(recent)
    return f"step {len(losses):>6}/{options.steps}  loss {mean:.4f}  lr {lr:.2e}  {speed:.1f} steps/s"


def final_loss(losses: list[float]) -> float:
    """The mean over the last 500 steps."""
    last = losses[-_FINAL:]
    return sum(last) / len(last)


def write_losses(folder: Path, losses: list[float], *, plot: bool = False) -> None:
    """Writes losses.csv, and losses.png where asked for."""
    rows = "".join(f"{step},{loss:.9g}\n" for step, loss in enumerate(losses, start=1))
    files.write_text(folder / "losses.csv", "step,loss\n" + rows)
    if plot:
        from ddpm_ext.plots import save_loss_curve

        save_loss_curve(losses, folder / "losses.png")


def versions() -> dict[str, str]:
    """What the numbers of a run depend on, with versions."""
    found = {"python": platform.python_version(), "ddpm-ext": __version__, "torch": torch.__version__}
    for package in ("diffusers", "numpy", "scikit-learn"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_training(
    folder: Path, options: TrainOptions, result: Result, images: int, resumed_at: int, command: str
) -> None:
    """Writes training.json: the command, options, versions, number of images and parameters, final loss, seconds."""
    content = {
        "command": command,
        "options": asdict(options),
        "versions": versions(),
        "images": images,
        "parameters": result.parameters,
        "final_loss": round(result.final_loss, 6),
        "final_loss_over_steps": min(_FINAL, options.steps),
        "seconds": round(result.seconds, 1),
        "resumed_at": resumed_at,
        "threads": torch.get_num_threads(),
    }
    files.write_json(folder / "training.json", content)
