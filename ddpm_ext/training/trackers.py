"""Trackers, which get the numbers of a run in addition to its files: TensorBoard and Weights & Biases."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_ext.base import files
from ddpm_ext.base.optional import require
from ddpm_ext.plots import grid, to_uint8

_RUN = "wandb.json"  # the file with the run's id at Weights & Biases


class TensorBoard:
    """Writes events to the run's folder tensorboard/. Events after `step`, from a killed run, are purged."""

    def __init__(self, folder: Path, step: int) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def pictures(self, samples: Tensor, step: int) -> None:
        self._writer.add_images("samples", (samples.float().cpu().clamp(-1, 1) + 1) / 2, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, under the same id when it is resumed.

    Args:
        folder: the run's folder. Its wandb.json has the id, and its wandb/ the package's files.
        project: the project's name.
        options: the run's options, which W&B shows.

    Raises:
        MissingExtra: the package wandb is not installed.
        ConnectionError: no run can be started, for example without a login.
    """

    def __init__(self, folder: Path, project: str, options: Mapping[str, Any]) -> None:
        self._wandb = require_wandb()
        try:
            self._run: Any = self._wandb.init(
                project=project,
                name=folder.resolve().name,
                id=_id_of(folder),
                resume="allow",
                dir=str(folder),
                config=dict(options),
            )
        except Exception as error:  # not all versions of the package have a public base class for its errors
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConnectionError(
                f"wandb: cannot start a run of {project} ({reason}); wandb login, or WANDB_MODE=offline, may help"
            ) from error
        # A resumed run repeats the steps after its checkpoint, but W&B's step may not decrease. So the training step is
        # logged as a metric, "step", which is the x-axis of all other metrics.
        self._run.define_metric("*", step_metric="step")

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def pictures(self, samples: Tensor, step: int) -> None:
        self._run.log({"samples": self._wandb.Image(grid(to_uint8(samples))), "step": step})

    def close(self) -> None:
        self._run.finish()


Tracker = TensorBoard | WandB
"""An object that gets the mean losses, scores and pictures of a run."""


def _id_of(folder: Path) -> str:
    """The run's id at Weights & Biases. If `folder` has none yet, a random id is written to it."""
    path = folder / _RUN
    try:
        return str(files.read_json(path)["id"])
    except (OSError, ValueError, TypeError, KeyError):
        files.write_json(path, {"id": secrets.token_hex(4)})
        return str(files.read_json(path)["id"])


def trackers_of(folder: Path, step: int, options: Mapping[str, Any]) -> list[Tracker]:
    """The trackers that a run's options ask for. folder: the run's folder. step: how many steps it has taken."""
    trackers: list[Tracker] = []
    if options["tensorboard"]:
        trackers.append(TensorBoard(folder, step))
    if options["wandb"]:
        trackers.append(WandB(folder, options["wandb"], options))
    return trackers


def require_tensorboard() -> None:
    """Raises MissingExtra, with the pip command, if TensorBoard is not installed."""
    require("tensorboard", "tensorboard: writing its events", in_demo=False)


def require_wandb() -> Any:
    """The package wandb; raises MissingExtra, with the pip command, if it is not installed."""
    return require("wandb", "wandb: logging to Weights & Biases", in_demo=False)
