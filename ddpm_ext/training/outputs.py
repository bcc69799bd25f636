"""What a run writes into its folder, by rank 0 alone: the log, checkpoints, grids of samples, and the result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_ext.base import files
from ddpm_ext.base.optional import require
from ddpm_ext.models.scheduler import DiffusionSettings
from ddpm_ext.training import checkpoints
from ddpm_ext.training import log as records
from ddpm_ext.training.network import save_result
from ddpm_ext.training.options import DTYPES, TrainOptions, check_same
from ddpm_ext.training.state import TrainState
from ddpm_ext.training.step import learning_rate

__all__ = ["Outputs", "Result", "check_extras"]

_RESULTS = ("model_index.json", "model.json", "training.json")


@dataclass(frozen=True)
class Result:
    """How a run ended: its folder, number of parameters, mean loss of the last steps, seconds of this process."""

    folder: Path
    parameters: int
    final_loss: float
    seconds: float


class Outputs:
    """A run's folder. `about`: what the run follows from beside its options; `report` gets a line now and then."""

    log: records.Log

    def __init__(
        self, folder: Path, options: TrainOptions, about: dict[str, Any], report: Callable[[str], None]
    ) -> None:
        self.folder, self.options, self.about, self.report = folder, options, about, report
        self._since: list[float] = []  # losses since the last line

    def open(self, until_the_end: ExitStack, *, resume: bool) -> Path | None:
        """Makes the folder the run's own; returns the checkpoint to go on from, if any.

        Raises ValueError if another run is at work there, or has been (without `resume`, or of something else).
        """
        folder = self.folder
        there = checkpoints.newest(folder) is not None or any((folder / name).exists() for name in _RESULTS)
        if there and not resume:
            raise ValueError(f"out: {folder} holds a run already; resume it, or give another folder")
        files.check_writable(folder / "training.json")  # only now, since it makes the folder
        (folder / ".lock").touch()
        until_the_end.enter_context(files.lock(folder / ".lock"))
        checkpoints.remove_leftovers(folder)
        step, path = 0, None
        if (found := checkpoints.latest(folder, self.report)) is not None:
            path, header = found
            check_same(self.about | asdict(self.options), header["about"] | header["options"], path)
            step = header["step"]
        self.log = records.Log(folder, step, tensorboard=self.options.tensorboard)
        until_the_end.callback(self.log.close)
        return path

    def record(
        self,
        state: TrainState,
        rows: list[records.Row],
        images_per_second: float,
        due: set[str],
        draw: Callable[[], Tensor],
    ) -> None:
        """What is due after a step, by the names of the options that tell how often.

        The log comes first, so that it has at least the steps that a checkpoint has.
        """
        options, step = self.options, state.step
        self.log.write(rows, images_per_second)
        self._since += [row.loss for row in rows]
        if "log_every" in due:
            lr = learning_rate(options, step - 1)
            self.report(records.line(self._since, step, options.steps, lr, images_per_second))
            self._since = []
        if "checkpoint_every" in due:
            header = state.numbers() | {"options": asdict(options), "about": self.about}
            checkpoints.save(self.folder, step, state.tensors(), header, options.keep)
        if "sample_every" in due:
            from ddpm_ext.plots import save_grid

            samples = draw().cpu()
            save_grid(samples, self.folder / "samples" / f"step-{step:08d}.png")
            self.log.pictures(samples, step)

    def finish(self, state: TrainState, settings: DiffusionSettings, seconds: float, about: dict[str, Any]) -> Result:
        """Writes the model and how it was made, with what `about` says besides."""
        from ddpm_ext.plots import save_loss_curve

        losses = self.log.losses()
        if losses:
            save_loss_curve(losses, self.folder / "losses.png")
        dtype = DTYPES[self.options.weights_dtype]
        self.report(save_result(state.average, settings, self.folder, dtype))
        parameters = sum(value.numel() for value in state.model.parameters())
        result = Result(self.folder, parameters, records.final_loss(losses), seconds)
        records.write_training(self.folder, self.options, result, about)
        return result


def check_extras(options: TrainOptions) -> None:
    """Raises MissingExtra now for a package that will be needed later."""
    require("matplotlib.figure", "the curve of losses")
    require("safetensors.torch", "writing checkpoints")
    if options.sample_every:
        require("PIL.Image", "writing pictures")
    if options.tensorboard:
        records.require_tensorboard()
