"""Where the numbers of a run go besides its own files: TensorBoard's events, and Weights & Biases."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_ext.base import files
from ddpm_ext.base.optional import require
from ddpm_ext.plots import grid, to_uint8

_RUN = "wandb.json"


class TensorBoard:
    """Events in the folder tensorboard/ of the run; those after `step`, of a run that was killed, are ignored."""

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
        folder: of the run; wandb.json there has the id, and wandb/ the package's own files.
        project: its name.
        options: of the run, which are shown beside it.

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
        except Exception as error:  # the package's own errors have no public base class in all versions
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConnectionError(
                f"wandb: cannot start a run of {project} ({reason}); wandb login, or WANDB_MODE=offline, may help"
            ) from error
        # The axis is our own: W&B's own step may not go back, but a resumed run does.
        self._run.define_metric("*", step_metric="step")

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def pictures(self, samples: Tensor, step: int) -> None:
        self._run.log({"samples": self._wandb.Image(grid(to_uint8(samples))), "step": step})

    def close(self) -> None:
        self._run.finish()


Tracker = TensorBoard | WandB
"""What the log writes to after each of its lines."""


def _id_of(folder: Path) -> str:
    """The id of the run, drawn when it is first started."""
    path = folder / _RUN
    try:
        return str(files.read_json(path)["id"])
    except (OSError, ValueError, TypeError, KeyError):
        files.write_json(path, {"id": secrets.token_hex(4)})
        return str(files.read_json(path)["id"])


def trackers_of(folder: Path, step: int, options: Mapping[str, Any]) -> list[Tracker]:
    """Those that the options of a run in `folder`, which has taken `step` steps, ask for."""
    found: list[Tracker] = []
    if options["tensorboard"]:
        found.append(TensorBoard(folder, step))
    if options["wandb"]:
        found.append(WandB(folder, options["wandb"], options))
    return found


def require_tensorboard() -> None:
    """Raises MissingExtra, with the pip command, if TensorBoard is not installed."""
    require("tensorboard", "tensorboard: writing its events", in_demo=False)


def require_wandb() -> Any:
    """The package wandb; raises MissingExtra, with the pip command, if it is not installed."""
    return require("wandb", "wandb: logging to Weights & Biases", in_demo=False)
