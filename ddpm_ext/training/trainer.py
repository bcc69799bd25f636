"""The training loop: takes steps, and between steps logs, saves checkpoints and draws samples."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_ext.base import ranks as distributed
from ddpm_ext.base.optional import require
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.models.classes import Classes
from ddpm_ext.tables.names import check_options
from ddpm_ext.training import checkpoints
from ddpm_ext.training.batches import Batch, StepBatches
from ddpm_ext.training.data import ImageSource, Latents, as_images, labels_of
from ddpm_ext.training.import_by_name import name_of
from ddpm_ext.training.interruption import NotedSignal, end, noted_signals
from ddpm_ext.training.load_run import Trained
from ddpm_ext.training.options import CHANGEABLE, TrainOptions, check_same_on_ranks
from ddpm_ext.training.outputs import Outputs, Result, check_extras
from ddpm_ext.training.progress import Bar, Clock, above_bar, progress_bar
from ddpm_ext.training.run_options import inputs_of, with_settings
from ddpm_ext.training.score import Features, Scorer, features_by_name
from ddpm_ext.training.setup import check_fit, make_model, try_out
from ddpm_ext.training.state import TrainState
from ddpm_ext.training.step import TrainingStep, at_hand

_log = logging.getLogger(__name__)
_INTERVALS = ("log_every", "checkpoint_every", "snapshot_every", "sample_every", "score_every")
# The options in _INTERVALS whose output is also written after the last step, unless the option is 0. The log and a
# checkpoint are always written then, samples only if the number of steps is a multiple of sample_every.
_AT_THE_END = ("snapshot_every", "score_every")


class Trainer:
    """Trains a denoiser. A run that is killed and resumed ends with the same weights as one that was never stopped.

    Under torchrun each process makes the same Trainer, and each takes a part of every batch. The images, the noise and
    the timesteps are the same for any number of processes.

    Args:
        model: a Module that is called as model(x, t) and returns (batch, channels, height, width), or an object with
            this tensor as `.sample`. For a learned variance it returns twice the channels. With options.classes it is
            called as model(x, t, labels), with int64 labels (batch,). Images whose label is dropped have the null
            class, whose number is the number of classes. The module is moved to the device and trained. Or the
            configuration of a UNet2DModel or a DiTTransformer2DModel, or a JSON file that holds one. With None, the
            options determine the model.
        diffusion: the schedule, the prediction and the variance. With None, the options determine it.
        data: "digits", "shapes", a folder of images, an .npz of latents, a tensor (count, channels, height, width), a
            map-style torch Dataset of images, or an ImageSource (see ddpm_ext.training.data.as_images). None means
            `options.data`.
        out: the folder for the model, the checkpoints and the log.
        options: the options. None means the defaults.
        resume: whether to continue from the newest checkpoint of the run in `out`. There must be a run.
        change: at a resume, the names of options that may differ from the run's, some of CHANGEABLE in
            ddpm_ext.training.options. `steps`, and options of speed, memory and output such as `workers`, may always
            differ. The learning rate of the remaining steps follows from the new options alone.
        command: the command line, for training.json.
        report: called with lines of text, on rank 0.
        progress: whether rank 0 shows a progress bar on a terminal. It needs tqdm.
        features: a function or network for `score_every`. It takes images, (batch, channels, height, width) in [-1, 1]
            on the device, and returns (batch, features). None means `options.features`.
        keywords: options that replace those in `options`.

    Raises:
        TypeError, ValueError: an option, the model or the data are wrong, or don't fit together.
        MissingExtra: a package that the run needs is not installed.
        UserCodeError: `features` raises an exception, which is this error's __cause__.

    Examples:
        >>> from ddpm_ext.training import Trainer
        >>> class Denoiser(torch.nn.Conv2d):
        ...     def forward(self, x, t):
        ...         return super().forward(x)
        >>> denoiser = Denoiser(3, 3, kernel_size=3, padding=1)
        >>> trainer = Trainer(denoiser, GaussianDiffusion(1000), images, "own-run", steps=2, batch_size=4)
        >>> result = trainer.fit()
        84 parameters, 4 images of shape (3, 8, 8), on ...
        step      2/2  loss ...
        own-run has the weights (model.safetensors) but no pipeline: the model is no UNet2DModel; ...
    """

    def __init__(
        self,
        model: nn.Module | dict[str, Any] | str | os.PathLike[str] | None = None,
        diffusion: GaussianDiffusion | None = None,
        data: Any = None,
        out: str | os.PathLike[str] = "run",
        options: TrainOptions | None = None,
        *,
        resume: bool = False,
        change: Collection[str] = (),
        command: str = "",
        report: Callable[[str], None] = print,
        progress: bool = False,
        features: Features | None = None,
        **keywords: Any,
    ) -> None:
        if features is not None:
            keywords["features"] = name_of(features)
        if data is not None:
            keywords["data"] = os.fspath(data) if isinstance(data, str | os.PathLike) else type(data).__name__
        check_options(keywords, TrainOptions.__dataclass_fields__, "training")
        options = replace(options or TrainOptions(), **keywords)
        if not os.fspath(out):
            raise ValueError("out: got an empty path, expected a folder")
        self.diffusion, self.settings, self.options = with_settings(diffusion, options)
        self.folder, self.resume, self.command = Path(out), resume, command
        self.ranks = distributed.ranks()
        is_first_rank = self.ranks.rank == 0
        self.progress = progress and is_first_rank
        self.report = checkpoints.discard if not is_first_rank else above_bar(report) if self.progress else report
        for name in change:
            if not resume or name not in CHANGEABLE:
                expected = "resume=True" if not resume else f"some of {', '.join(CHANGEABLE)}"
                raise ValueError(f"change: got {name}, expected {expected}")
        check_extras(self.options)
        if self.progress:
            require("tqdm", "the progress bar")
        self.device = torch.device(self.ranks.device(self.options.device))
        source = self.options.data if data is None else data
        self.images: ImageSource = as_images(
            source, self.options.image_size, self.options.channels, self.options.random_crop
        )
        self.labels = labels_of(self.images) if self.options.classes else None
        self.classes = None if self.labels is None else Classes.of_labels(self.labels.names, self.options.class_dropout)
        check_fit(self.options, self.images, self.ranks)
        if self.options.score_every:
            feature_function = features_by_name(self.options.features) if features is None else features
            self._scorer = Scorer(feature_function, self.images, self.options, self.device)
        with _current_device(self.device):
            shape, labelled = self.images.shape, self.labels is not None
            self.model = make_model(model, self.options, shape, self.classes, self.device)
            try_out(self.model, self.diffusion, self.options, shape, self.device, labelled=labelled)
            if self.options.score_every:
                self._scorer.try_out()
            self.state = TrainState(self.model, self.options, self.device)
        self._skipped: list[str] = []  # errors of images that this rank has skipped since it last told the other ranks
        weight_inputs = inputs_of(self.model, self.images, self.labels, self.diffusion)
        self._outputs = Outputs(
            self.folder, self.options, weight_inputs, self.settings, self.classes, self.report, change
        )

    def sample(self) -> Tensor:
        """Samples from the averaged model with options.sample_steps steps of DDIM, and all classes in turn.

        Each call has the same noise.

        Returns:
            (options.sample_count, channels, height, width).
        """
        return self._draw(range(self.options.sample_count))

    def _draw(self, samples: range) -> Tensor:
        """Samples with DDIM from the averaged model. samples: the ids of the samples, which determine their noise."""
        clip = not isinstance(self.images, Latents)
        average = Trained(self.state.average, self.settings, self.images.shape, self.classes, self.diffusion, clip)
        steps, seed = self.options.sample_steps, self.options.seed
        return average.sample(len(samples), first=samples.start, seed=seed, sampler="ddim", steps=steps)

    def fit(self) -> Result:
        """Trains until `options.steps` steps are taken, and writes the averaged model to the folder.

        An unconditional UNet2DModel of images is written as a DDPMPipeline of diffusers. The folder also holds

        - options.json, which is written before the first step;
        - training.json (options, versions, final loss), losses.csv and losses.png;
        - checkpoints/: one checkpoint every `options.checkpoint_every` steps, of which the last `options.keep` remain;
        - samples/: a grid of samples every `options.sample_every` steps;
        - with `options.score_every`, scores.csv, and best/ with the averaged model of the step with the lowest score;
        - with `options.extra_emas`, ema-DECAY/ with the averaged model of each further decay;
        - with `options.snapshot_every`, snapshots/ for post_hoc_average;
        - with `options.tune`, tuned/ with a step table for each number of model calls in that option.

        After Ctrl-C or SIGTERM, the run finishes the current step, writes a checkpoint and stops. A second signal ends
        the run at once. Before an exception ends the run, a checkpoint of the last step is written if the losses are
        finite. With several ranks, this checkpoint is written only if rank 0 has already read the losses.

        Returns:
            Result, with `folder`, `parameters` (how many the model has), `final_loss` and `seconds`.

        Raises:
            KeyboardInterrupt, SystemExit: Ctrl-C, or SIGTERM with the code 143, after the checkpoint was written. If
                rank 0 raises an error of its own, the other ranks raise SystemExit with the code 2.
            TypeError: an item of a Dataset is no image.
            ValueError: `resume` is false, and the folder holds a run; `resume` is true, and the folder holds no run, or
                a run with other options, data or another model; a loss or a gradient is not finite; an image can't be
                read; or the ranks differ in options, data or model.
            OSError: a file can't be written; or a worker process died, or returned no batch for ten minutes.
            UserCodeError: `features` raises an exception, which is this error's __cause__.
            ConnectionError: another rank was lost; or the model has been written but can't be uploaded.
        """
        started = time.monotonic()
        with ExitStack() as stack:
            self.ranks = stack.enter_context(distributed.join())
            outputs, ranks = self._outputs, self.ranks
            inputs_of_ranks = ranks.gather(outputs.weight_inputs | asdict(self.options))
            ranks.share(lambda: check_same_on_ranks(inputs_of_ranks))
            stack.enter_context(_current_device(self.device))
            self._restore(ranks.share(lambda: outputs.open(stack, resume=self.resume)))
            step = TrainingStep(self.state, self.diffusion, self.options, ranks, self.device)
            self.report(self._first_line())
            details = {"command": self.command, "images": len(self.images), "ranks": ranks.size}
            first_step = self.state.step
            ranks.share(partial(outputs.catch_up, first_step, self.sample))
            with ranks.in_touch(), progress_bar(self.options.steps, first_step, shown=self.progress) as bar:
                self._train(step, bar)
            seconds = time.monotonic() - started
            details |= {"resumed_at": first_step, "skipped": list(self.state.skipped)}
            return ranks.share(lambda: outputs.finish(self.state, seconds, details))

    def _restore(self, path: Path | None) -> None:
        """Restores the state from the checkpoint at `path`. With None, checks that the state is that of step 0."""
        if path is not None:
            tensors, header = checkpoints.load(path)
            self.state.restore(tensors, header, path)
            text = f"resumed at step {self.state.step} from {path}"
            self.report(text)
            _log.info(text)
        elif self.state.step:
            raise ValueError(
                f"fit: this Trainer has taken {self.state.step} steps of which no checkpoint was saved; make another"
            )

    def _first_line(self) -> str:
        """The line that a run reports first: the sizes of the model and the data, and the device."""
        ranks = f", by {self.ranks.size} ranks" if self.ranks.size > 1 else ""
        parameters = sum(value.numel() for value in self.model.parameters())
        classes = "" if self.classes is None else f" and {len(self.classes.names)} classes"
        return (
            f"{parameters:,} parameters, {len(self.images):,} images of shape {self.images.shape}{classes}, "
            f"on {self.device}{ranks}"
        )

    def _train(self, step: TrainingStep, bar: Bar) -> None:
        """Takes all remaining steps, and writes a checkpoint if one of them raises an exception."""
        options, state = self.options, self.state
        batches = StepBatches(self.images, options, step.samples.start, step.samples.stop, self.labels)
        clock = Clock(state.step)
        # The order matters: the block's end stops the worker processes before it restores the signal handlers. If a
        # signal has arrived, the death of a worker is ignored until then.
        with noted_signals() as signals, batches.reading(state.step, options.steps, self.device) as read:
            try:
                self._take_steps(step, bar, clock, signals, read)
            except Exception as error:
                self._rescue(step, clock, error)
                raise

    def _take_steps(
        self, step: TrainingStep, bar: Bar, clock: Clock, signals: NotedSignal, read: Iterator[Batch]
    ) -> None:
        """Takes all remaining steps. Between steps, writes what is due, and ends the run if a signal has arrived.

        Args:
            step: takes a step.
            bar, clock: show the progress, and measure the speed.
            signals: the signal that has arrived, if any.
            read: yields the batches.
        """
        options, state, outputs = self.options, self.state, self._outputs
        bar_reads_each = self.progress and at_hand(self.device, self.ranks)  # whether the bar gets each step's loss
        while state.step < options.steps:
            # signals.next returns None if a signal arrives before the batch. It is used only with one rank: with
            # several ranks, the other ranks would wait forever in the step that this rank left out.
            batch = signals.next(read) if self.ranks.size == 1 else next(read)
            if batch is not None:
                step.take(batch.images, batch.labels)
                self._skipped += batch.skipped
                if bar_reads_each:
                    bar.show([step.newest_loss()])
                bar.advance()
            intervals = {name: getattr(options, name) for name in _INTERVALS}
            due = {name for name, steps in intervals.items() if batch and steps and state.step % steps == 0}
            last = state.step == options.steps
            if signal := 0 if last else self.ranks.largest(signals.number):
                self.report(f"interrupted: stopping after step {state.step}; a second signal ends the run at once")
            if last:
                due |= {name for name in _AT_THE_END if intervals[name]}
            if last or signal:
                due |= {"log_every", "checkpoint_every"} if batch else {"checkpoint_every"}
            if due:
                rows = step.log_rows(lambda: checkpoints.newest(self.folder))
                outputs.add(rows)
                if not bar_reads_each:
                    bar.show(row.loss for row in rows)
                speed = clock.steps_per_second(state.step) * options.batch_size
                self._report_skipped()
                score = self._scorer.score(self._draw, self.ranks) if "score_every" in due else None
                self.ranks.share(partial(outputs.record, state, speed, due, self.sample, score))
            if signal:
                self.report(f"{checkpoints.newest(self.folder)} is written; a resume continues from it")
                end(signal)

    def _rescue(self, step: TrainingStep, clock: Clock, ended_by: Exception) -> None:
        """Writes and reports a checkpoint before an exception ends the run, unless this step's was written or failed.

        A checkpoint is written only if the losses are finite. With several ranks, rank 0 can't ask the other ranks for
        their losses, since a rank may be lost. So rank 0 writes a checkpoint only if it has already read all losses.
        """
        state, outputs = self.state, self._outputs
        single_rank = self.ranks.size == 1
        losses_known = single_rank or (self.ranks.rank == 0 and step.whole and step.losses_known)
        if outputs.has_tried(state.step) or not losses_known:
            return
        try:
            if not step.whole:
                raise RuntimeError(f"step {state.step + 1} failed when it had changed the model")
            if single_rank:
                outputs.add(step.log_rows(lambda: checkpoints.newest(self.folder)))
                self._report_skipped()
            outputs.rescue(state, clock.steps_per_second(state.step) * self.options.batch_size)
        except Exception as error:
            if str(error) != str(ended_by):
                self.report(f"no checkpoint of step {state.step} could be written: {error}")

    def _report_skipped(self) -> None:
        """Reports the images that were skipped for the first time on any rank, and adds them to each rank's state."""
        if self.options.skip_corrupt:
            for image in dict.fromkeys(text for of_rank in self.ranks.gather(self._skipped) for text in of_rank):
                if image not in self.state.skipped:
                    self.state.skipped[image] = None
                    self.report(f"skipped: {image}")
        self._skipped.clear()


def train(options: TrainOptions, out: str | os.PathLike[str], **keywords: Any) -> Result:
    """Trains as `ddpm-ext train` does: Trainer(out=out, options=options, **keywords).fit().

    Examples:
        >>> from ddpm_ext.training import TrainOptions, train
        >>> options = TrainOptions(data="shapes", steps=2, batch_size=4, widths=(8, 8), attention=(), groups=4)
        >>> result = train(options, "my-run")
        17,899 parameters, 65,536 images of shape (3, 16, 16), on ...
        step      2/2  loss ...
        my-run is the folder of a DDPMPipeline, which ddpm-ext sample and diffusers can read
    """
    return Trainer(out=out, options=options, **keywords).fit()


@contextmanager
def _current_device(device: torch.device) -> Iterator[None]:
    """Makes a GPU the current device in the block, and restores torch's generators afterwards."""
    cuda = device.type == "cuda"
    with torch.cuda.device(device) if cuda else nullcontext(), torch.random.fork_rng([device] if cuda else []):
        yield
