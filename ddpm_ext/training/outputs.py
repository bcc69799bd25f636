"""Writes the files of a run, on rank 0: the log, checkpoints, grids of samples, and the result."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_ext.base import files
from ddpm_ext.base.optional import require
from ddpm_ext.models import tuned
from ddpm_ext.models.classes import Classes
from ddpm_ext.models.networks import FOLDERS
from ddpm_ext.models.scheduler import DiffusionSettings
from ddpm_ext.plots import save_grid, save_loss_curve
from ddpm_ext.training import checkpoints, log, post_hoc, run_options
from ddpm_ext.training.hub import push_to_hub
from ddpm_ext.training.network import known_kind, save_result
from ddpm_ext.training.options import CHANGEABLE, DTYPES, TrainOptions, as_json, check_same, with_new_defaults
from ddpm_ext.training.state import TrainState
from ddpm_ext.training.step import learning_rate
from ddpm_ext.training.trackers import require_tensorboard, require_wandb, trackers_of
from ddpm_ext.training.tuned import tune_run

BEST = "best"
"""The sub-folder of a run with the averaged model that has the best score."""
# A folder with one of these files holds a finished run.
_RESULT_FILES = ("model_index.json", "model.json", "training.json")


@dataclass(frozen=True)
class Result:
    """The result of a run.

    folder: the run's folder.
    parameters: the number of the model's parameters.
    final_loss: the mean loss of the last tenth of the steps.
    seconds: how long Trainer.fit took to train, without the time before a resume.
    """

    folder: Path
    parameters: int
    final_loss: float
    seconds: float


class Outputs:
    """Writes the files in the folder of a run.

    Args:
        folder: the folder's path.
        options: the options of the run.
        weight_inputs: the inputs, besides the options, on which the weights depend. See run_options.inputs_of.
        settings, classes: the diffusion's settings and the classes of the model that is written.
        report: called with lines of text.
        change: the names of options that may differ from those of the run that is resumed.
    """

    def __init__(
        self,
        folder: Path,
        options: TrainOptions,
        weight_inputs: dict[str, Any],
        settings: DiffusionSettings,
        classes: Classes | None,
        report: Callable[[str], None],
        change: Collection[str],
    ) -> None:
        self.settings, self.classes = settings, classes
        self.change = change
        self.folder, self.options, self.weight_inputs, self.report = folder, options, weight_inputs, report
        self._unlogged_rows: list[log.LogRow] = []  # steps that are not in the log yet
        self._since_progress_line: list[log.LogRow] = []  # steps since the last progress line
        self._last_attempt = 0  # the step of the last checkpoint that was written or whose writing failed

    def open(self, exit_stack: ExitStack, *, resume: bool) -> Path | None:
        """Locks the folder for this run and opens the log. Closing `exit_stack` undoes both.

        Returns:
            The checkpoint to continue from, or None.

        Raises:
            ValueError: a file or folder that the run will write later can't be written; another run is writing to the
                folder; `resume` is false, and the folder holds a run; or `resume` is true, and the folder holds no run,
                a run with other options, data or another model, or a run that has taken more than options.steps steps.
        """
        folder = self.folder
        has_run = checkpoints.newest(folder) is not None or any((folder / name).exists() for name in _RESULT_FILES)
        if has_run and not resume:
            raise ValueError(f"out: {folder} holds a run already; resume it, or give another folder")
        if resume:
            run_options.find(folder)
        self._check_writable()  # makes the folder, so it comes after the checks above
        (folder / ".lock").touch()
        exit_stack.enter_context(files.lock(folder / ".lock"))
        checkpoints.remove_leftovers(folder)
        step, path = 0, None
        if resume:
            path, header = run_options.find(folder, self.report)
            check_same(
                self.weight_inputs | asdict(self.options), header["about"] | header["options"], folder, self.change
            )
            step = self._last_attempt = header["step"]
            if step > self.options.steps:
                raise ValueError(f"steps: got {self.options.steps}, expected at least {step}, which this run has taken")
            self._report_changes(header["options"])
            if path.name == run_options.OPTIONS:
                self.report(f"{folder} has no checkpoint yet, so its run starts again at step 0")
                path = None
        post_hoc.remove_later(folder, step)
        run_options.save(folder, asdict(self.options), self.weight_inputs)
        self.log = log.Log(folder, step, trackers_of(folder, step, asdict(self.options)))
        exit_stack.callback(self.log.close)
        return path

    def _check_writable(self) -> None:
        """Raises ValueError if the run can't write one of its files or folders. Creates no sub-folder."""
        options = self.options
        names = ["training.json", run_options.OPTIONS, ".lock", "losses.csv", "losses.png"]
        folders = ["checkpoints", "scheduler", *(f"ema-{decay}" for decay in options.extra_emas)]
        if (kind := self.weight_inputs[f"{run_options.MODEL_PREFIX}class"]) in FOLDERS:
            names, folders = [*names, "model_index.json"], [*folders, FOLDERS[kind]]
        else:
            names += ["model.json", "model.safetensors"]
        if options.score_every:
            names, folders = [*names, "scores.csv"], [*folders, BEST]
        optional_folders = {
            "samples": options.sample_every,
            post_hoc.SNAPSHOTS: options.snapshot_every,
            tuned.FOLDER: options.tune,
            "tensorboard": options.tensorboard,
        }
        folders += [name for name, value in optional_folders.items() if value]
        for name in names:
            files.check_writable(self.folder / name)
        for name in folders:
            # A missing folder is not created now: a program would take an empty best/ for a model.
            if os.path.lexists(self.folder / name):
                files.check_writable(self.folder / name / "file")

    def _report_changes(self, before: dict[str, Any]) -> None:
        """Reports `steps` and the options in CHANGEABLE that differ from `before`, the options before the resume."""
        before, now = with_new_defaults(before), as_json(self.options)
        for name in (*CHANGEABLE, "steps"):
            if now[name] != before[name]:
                self.report(f"changed: {name} is {now[name]}, before {before[name]}")

    def add(self, rows: list[log.LogRow]) -> None:
        """Adds steps, all with finite losses, to the next lines of the log."""
        self._unlogged_rows += rows

    def record(
        self,
        state: TrainState,
        images_per_second: float,
        due: set[str],
        draw: Callable[[], Tensor],
        score: float | None = None,
    ) -> None:
        """Writes the log and everything else that is due after a step.

        The log is written first, so that it has at least the steps of the newest checkpoint.

        Args:
            state: the state after the step.
            images_per_second: for the log.
            due: the names of the options whose interval ends at this step, such as log_every.
            draw: makes samples, (count, channels, height, width) in [-1, 1].
            score: the averaged model's score, or None if it was not scored.
        """
        options, step = self.options, state.step
        self._write_log(images_per_second)
        if "log_every" in due:
            lr = learning_rate(options, step - 1)
            self.report(log.progress_line(self._since_progress_line, step, options.steps, lr, images_per_second))
            self._since_progress_line = []
        if score is not None:  # before the checkpoint, which contains the score
            self._record_score(state, score)
        if "snapshot_every" in due:  # before the checkpoint: a resume from it writes only later snapshots
            post_hoc.write_snapshots(self.folder, step, state.power)
        if "checkpoint_every" in due:
            self._checkpoint(state)
        if "sample_every" in due:
            self._draw(step, draw)

    def catch_up(self, step: int, draw: Callable[[], Tensor]) -> None:
        """Draws samples after a resume, if samples are due at the checkpoint's step and their picture is missing.

        It is missing if the run was killed between writing the checkpoint and drawing the samples.
        """
        every = self.options.sample_every
        if step and every and step % every == 0 and not self._picture(step).exists():
            self._draw(step, draw)

    def _draw(self, step: int, draw: Callable[[], Tensor]) -> None:
        """Draws samples, writes their picture and passes them to the trackers."""
        samples = draw().cpu()
        save_grid(samples, self._picture(step))
        for tracker in self.log.trackers:
            tracker.pictures(samples, step)

    def _picture(self, step: int) -> Path:
        """The path of the picture of a step's samples."""
        return self.folder / "samples" / f"step-{step:08d}.png"

    def _write_log(self, images_per_second: float) -> None:
        """Writes the steps that are not in the log yet. After an error, the same steps are not written again."""
        rows, self._unlogged_rows = self._unlogged_rows, []
        self._since_progress_line += rows
        self.log.write(rows, images_per_second)

    def _checkpoint(self, state: TrainState) -> Path:
        """Writes a checkpoint and returns its path."""
        self._last_attempt = state.step
        header = state.numbers() | {"options": asdict(self.options), "about": self.weight_inputs}
        return checkpoints.save(self.folder, state.step, state.tensors(), header, self.options.keep)

    def has_tried(self, step: int) -> bool:
        """Whether a checkpoint of the step was written, or writing it failed."""
        return step == self._last_attempt

    def rescue(self, state: TrainState, images_per_second: float) -> None:
        """Writes the log, if possible, and a checkpoint before an exception ends the run, and reports the checkpoint.

        Raises:
            OSError: the checkpoint can't be written.
        """
        with suppress(Exception):  # the log's file or a tracker may have raised the exception that ends the run
            self._write_log(images_per_second)
        self.report(f"{self._checkpoint(state)} is written; a resume continues from it")

    def _record_score(self, state: TrainState, score: float) -> None:
        """Logs and reports the score. If it is the best so far, writes the averaged model to best/."""
        scores, step = state.scores, state.step
        scores.by_step[step] = score
        for tracker in self.log.trackers:
            tracker.numbers({"score": score}, step)
        lines = "".join(f"{best_step},{value:.9g}\n" for best_step, value in sorted(scores.by_step.items()))
        files.write_text(self.folder / "scores.csv", f"step,score\n{lines}")
        best_step, best = scores.best or (step, score)
        if best_step == step:
            self._save_model(state.average, self.folder / BEST)
            settings = dict(zip(("features", "samples", "sample_steps"), scores.compared_options, strict=True))
            files.write_json(self.folder / BEST / "score.json", {"step": step, "score": score, **settings})
            self.report(f"score {score:.4f} at step {step}, the best so far: {self.folder / BEST} has the model")
        else:
            self.report(f"score {score:.4f} at step {step}; the best is {best:.4f} at step {best_step}")

    def _save_model(self, model: nn.Module, folder: Path) -> str:
        """Writes a model to a folder. Returns a sentence that says which programs can read the folder."""
        dtype = DTYPES[self.options.weights_dtype]
        clip = run_options.LATENTS not in self.weight_inputs
        return save_result(
            model, self.settings, folder, dtype, self.weight_inputs[run_options.SHAPE], self.classes, clip
        )

    def finish(self, state: TrainState, seconds: float, details: dict[str, Any]) -> Result:
        """Writes the averaged models, the loss curve, and training.json with `details`.

        If the options ask for it, this then tunes step tables to the model, and uploads the model. If the run was
        already finished before this start, training.json keeps its content, except for the options.
        """
        self.report(self._save_model(state.average, self.folder))
        for decay, average in state.extra.items():
            self._save_model(average, self.folder / f"ema-{decay}")
        losses = log.read_losses(self.log.path)
        if losses:
            title, quarters = log.curve_title(asdict(self.options)), log.read_quarters(self.log.path)
            save_loss_curve(losses, self.folder / "losses.png", title=title, quarters=quarters)
        parameters = sum(value.numel() for value in state.model.parameters())
        result = Result(self.folder, parameters, log.final_loss(losses), seconds)
        if state.scores.best is not None:
            details = details | {"best": dict(zip(("step", "score"), state.scores.best, strict=True))}
        if details["resumed_at"] < self.options.steps or not self._update_options():
            self._write_training(result, details)
        if self.options.tune:
            self._tune(state.average)
        if repo := self.options.push_to_hub:
            model = None if known_kind(state.average) else state.average
            url = push_to_hub(self.folder, repo, model=model, private=self.options.hub_private or None)
            self.report(f"uploaded to {url}")
        return result

    def _tune(self, average: nn.Module) -> None:
        """Tunes the tables that the options ask for, on the model's device."""
        options, device = self.options, next(average.parameters()).device
        keywords = {"seed": options.seed, "batch_size": options.batch_size, "device": device, "report": self.report}
        tune_run(self.folder, average, options.tune, **keywords)  # type: ignore[arg-type]

    def _update_options(self) -> bool:
        """Replaces the options in training.json, if the file exists and its options have the same number of steps.

        A file with another number of steps describes an earlier end of the run, so all of it must be written anew.

        Returns whether the options were replaced.
        """
        path = self.folder / "training.json"
        try:
            previous = files.read_json(path)
            if previous["options"]["steps"] != self.options.steps:
                return False
        except (OSError, ValueError, TypeError, KeyError):
            return False
        files.write_json(path, previous | {"options": asdict(self.options)})
        return True

    def _write_training(self, result: Result, details: dict[str, Any]) -> None:
        """Writes training.json, which says how the model was trained."""
        final = round(result.final_loss, 6) if math.isfinite(result.final_loss) else None
        content = {
            **details,
            "options": asdict(self.options),
            "versions": log.versions(),
            "parameters": result.parameters,
            "final_loss": final,
            "final_loss_over_steps": log.final_steps(self.options.steps),
            "seconds": round(result.seconds, 1),
            "threads": torch.get_num_threads(),
        }
        files.write_json(self.folder / "training.json", content)


def check_extras(options: TrainOptions) -> None:
    """Raises MissingExtra if a package that the run will need later is not installed."""
    require("matplotlib.figure", "the curve of losses")
    require("safetensors.torch", "writing checkpoints")
    if options.sample_every:
        require("PIL.Image", "writing pictures")
    if options.tensorboard:
        require_tensorboard()
    if options.wandb:
        require_wandb()
