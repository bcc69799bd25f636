"""The training loop: steps, and between them what is logged, saved and drawn."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_ext.base import ranks as distributed
from ddpm_ext.base.optional import require
from ddpm_ext.base.seeds import seed_for
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.models.scheduler import DiffusionSettings
from ddpm_ext.ops.noise import Philox
from ddpm_ext.training import checkpoints, network
from ddpm_ext.training.batches import StepBatches
from ddpm_ext.training.data import Images, as_images
from ddpm_ext.training.options import TrainOptions, check_same_on_ranks
from ddpm_ext.training.outputs import Outputs, Result, check_extras
from ddpm_ext.training.state import TrainState
from ddpm_ext.training.step import Stepper, loss_options

__all__ = ["Trainer", "train"]

_EVERY = ("log_every", "checkpoint_every", "sample_every")


class Trainer:
    """Trains a denoiser; a run that is killed and resumed ends with the same weights as one that never stopped.

        result = Trainer(model, diffusion, dataset, "my-run", steps=50_000, batch_size=64).fit()

    Under torchrun each process makes the same Trainer: the ranks share each batch, and any number of them sees the
    same images, noise and timesteps.

    Args:
        model: a Module, model(x, t) -> (batch, channels, height, width), or with .sample, twice the channels for a
            learned variance; it is moved to the device and trained. Or a UNet2DModel's configuration, or the JSON file
            that holds one. None: a UNet2DModel by the options.
        diffusion: its schedule, prediction and variance; None: by the options.
        data: "digits", a folder of images, a tensor (count, channels, height, width), or a map-style torch Dataset of
            images: see ddpm_ext.data.as_images. None: by the options.
        out: the folder for the model, checkpoints and records.
        options: all the rest; keywords replace what stands there.
        resume: go on from the newest checkpoint in `out`, or start where there is none.
        command: what training.json says made it.
        report: gets a line of text now and then, on rank 0.
        progress: whether rank 0 shows a progress bar; it needs tqdm.

    Raises:
        TypeError, ValueError: an option, the model or the data don't fit, alone or together. MissingExtra: a package
            is needed that isn't there.
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
        command: str = "",
        report: Callable[[str], None] = print,
        progress: bool = False,
        **keywords: Any,
    ) -> None:
        if data is not None:
            keywords["data"] = os.fspath(data) if isinstance(data, str | os.PathLike) else type(data).__name__
        options = replace(options or TrainOptions(), **keywords)
        self.diffusion, self.settings, self.options = _settle(diffusion, options)
        self.folder, self.resume, self.command = Path(out), resume, command
        self.ranks = distributed.ranks()
        first = self.ranks.rank == 0
        self.progress = progress and first
        self._plain_report = report if first else _to_nobody
        self.report = self._report_beside_bar if self.progress else self._plain_report
        check_extras(self.options)
        if self.progress:
            require("tqdm", "the progress bar")
        self.device = torch.device(self.ranks.device(self.options.device))
        self.images: Images = as_images(
            self.options.data if data is None else data, self.options.image_size, self.options.channels
        )
        if self.options.sample_every and self.images.shape[0] not in (1, 3):
            raise ValueError(f"sample_every: images have {self.images.shape[0]} channels, pictures need 1 or 3")
        if self.options.batch_size < self.ranks.size * self.options.accumulate:
            raise ValueError(
                f"batch_size: got {self.options.batch_size}, expected at least {self.ranks.size} ranks times "
                f"{self.options.accumulate} to accumulate"
            )
        with _at_home(self.device):
            self.model = self._make_model(model)
            self._try_out()
            self.state = TrainState(self.model, self.options, self.device)
        about = _about(self.model, self.images, self.diffusion)
        self._outputs = Outputs(self.folder, self.options, about, self.report)

    def _make_model(self, model: Any) -> nn.Module:
        if not isinstance(model, nn.Module):
            source = self.options.model_config if model is None else model
            torch.manual_seed(seed_for(self.options.seed, "weights"))
            model = network.make_unet(source, self.options, self.images.shape)
        return nn.Module.to(model, self.device).train()

    def _try_out(self) -> None:
        """Refuses what the first step would refuse: a model, or a loss, that the diffusion can't have."""
        x, t = torch.zeros(1, *self.images.shape, device=self.device), torch.zeros(1, dtype=torch.int64)
        with torch.no_grad():
            output = network.try_out(self.model, x, t.to(self.device), self.diffusion.variance)
            self.diffusion.train_losses(lambda x, t: output, x, 0, rng=Philox(0), **loss_options(self.options))

    def sample(self) -> Tensor:
        """Samples (sample_count, channels, height, width) by the average, of the same noise each time: DDIM's, in
        `options.sample_steps`."""
        options = self.options
        with torch.no_grad():
            samples = self.diffusion.p_sample_loop(
                self.state.average,
                (options.sample_count, *self.images.shape),
                sampler="ddim",
                steps=options.sample_steps,
                rng=Philox(options.seed),
                record="last",
                progress=False,
                device=self.device,
            )
        assert isinstance(samples, Tensor)  # what "last" gives
        return samples

    # --------------------------------------------------------------------------------------------------- the run

    def fit(self) -> Result:
        """Trains up to `options.steps` and writes the model to the folder, as a DDPMPipeline of diffusers if it is a
        UNet2DModel.

        Beside it stand training.json (options, versions, final loss), losses.csv and losses.png, in checkpoints/ the
        last `options.keep`, one every `options.checkpoint_every` steps, and in samples/ the grids of
        `options.sample_every`.

        Raises:
            ValueError: the folder holds a run already (without resume) or one with other options, model or data (with
                it), a loss is not finite, an image can't be read, or the ranks are not about to do the same.
            OSError: a file can't be written. ConnectionError: another rank was lost.
        """
        started = time.monotonic()
        with ExitStack() as until_the_end:
            self.ranks = until_the_end.enter_context(distributed.join())
            outputs, ranks = self._outputs, self.ranks
            every = ranks.gather(outputs.about | asdict(self.options))
            ranks.share(lambda: check_same_on_ranks(every))
            until_the_end.enter_context(_at_home(self.device))
            self._restore(ranks.share(lambda: outputs.open(until_the_end, resume=self.resume)))
            stepper = Stepper(self.state, self.diffusion, self.options, ranks, self.device)
            self.report(self._opening())
            about = {"command": self.command, "images": len(self.images), "ranks": ranks.size}
            begun = self.state.step
            with ranks.in_touch(), _bar(self.options.steps, self.state.step, shown=self.progress) as advance:
                self._train(stepper, advance)
            seconds = time.monotonic() - started
            about |= {"resumed_at": begun, "skipped": list(self.state.skipped)}
            return ranks.share(lambda: outputs.finish(self.state, self.settings, seconds, about))

    def _restore(self, path: Path | None) -> None:
        if path is not None:
            tensors, header = checkpoints.load(path)
            self.state.restore(tensors, header, path)
            self.report(f"resumed at step {self.state.step} from {path}")
        elif self.state.step:
            raise ValueError(f"fit: this Trainer has taken {self.state.step} steps that nothing saved; make another")

    def _opening(self) -> str:
        ranks = f", by {self.ranks.size} ranks" if self.ranks.size > 1 else ""
        parameters = sum(value.numel() for value in self.model.parameters())
        return (
            f"{parameters:,} parameters, {len(self.images):,} images of shape {self.images.shape}, "
            f"on {self.device}{ranks}"
        )

    def _train(self, stepper: Stepper, advance: Callable[[], object]) -> None:
        options, state = self.options, self.state
        batches = StepBatches(self.images, options, stepper.rows.start, stepper.rows.stop)
        clock, skipped = _Clock(state.step), []
        for batch in batches.iterate(state.step, options.steps, self.device):
            stepper.take(batch.images)
            skipped += batch.skipped
            advance()
            due = {name for name in _EVERY if getattr(options, name) and state.step % getattr(options, name) == 0}
            if state.step == options.steps:
                due |= {"log_every", "checkpoint_every"}
            if due:
                rows = stepper.numbers(lambda: checkpoints.newest(self.folder))
                speed = clock.steps_a_second(state.step) * options.batch_size
                self._note_skipped(skipped)
                self.ranks.share(partial(self._outputs.record, state, rows, speed, due, self.sample))

    def _note_skipped(self, skipped: list[str]) -> None:
        """Tells of images that are new among those skipped on any rank; all ranks know them."""
        if self.options.skip_corrupt:
            for found in dict.fromkeys(text for own in self.ranks.gather(skipped) for text in own):
                if found not in self.state.skipped:
                    self.state.skipped[found] = None
                    self.report(f"skipped: {found}")
        skipped.clear()

    def _report_beside_bar(self, text: str) -> None:
        with require("tqdm", "the progress bar").tqdm.external_write_mode():
            self._plain_report(text)


@contextmanager
def _bar(steps: int, begun: int, *, shown: bool) -> Iterator[Callable[[], object]]:
    """A progress bar around the block, if it is to be shown; what is called at each step."""
    if not shown:
        yield lambda: None
        return
    tqdm = require("tqdm", "the progress bar").tqdm
    with tqdm(total=steps, initial=begun, desc="training", unit="step") as bar:
        yield bar.update


class _Clock:
    """Steps a second since it was last asked."""

    def __init__(self, step: int) -> None:
        self.step, self.at = step, time.monotonic()

    def steps_a_second(self, step: int) -> float:
        now = time.monotonic()
        rate = (step - self.step) / max(now - self.at, 1e-9)
        self.step, self.at = step, now
        return rate


def train(
    options: TrainOptions,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    command: str = "",
    report: Callable[[str], None] = print,
    progress: bool = False,
) -> Result:
    """What `ddpm-ext train` does: Trainer(out=out, options=options, ...).fit()."""
    return Trainer(out=out, options=options, resume=resume, command=command, report=report, progress=progress).fit()


def _settle(
    diffusion: GaussianDiffusion | None, options: TrainOptions
) -> tuple[GaussianDiffusion, DiffusionSettings, TrainOptions]:
    """The diffusion, its settings, and the options with them."""
    if diffusion is None:
        settings = DiffusionSettings(options.timesteps, options.beta_schedule, options.prediction, options.variance)
        return settings.diffusion(), settings, options
    if not isinstance(diffusion, GaussianDiffusion):
        raise TypeError(f"diffusion is a {type(diffusion).__name__}, expected a GaussianDiffusion")
    if diffusion.prediction not in ("eps", "x0", "v"):
        raise ValueError(f"diffusion: its prediction is {diffusion.prediction!r}, expected 'eps', 'x0' or 'v'")
    betas = tuple(diffusion.betas.tolist())
    settings = DiffusionSettings(diffusion.timesteps, betas, diffusion.prediction, diffusion.variance)
    its_own: dict[str, Any] = {
        "timesteps": settings.timesteps,
        "prediction": settings.prediction,
        "variance": settings.variance,
    }
    return diffusion, settings, replace(options, beta_schedule="given", **its_own)


def _about(model: nn.Module, images: Images, diffusion: GaussianDiffusion) -> dict[str, Any]:
    """What the weights follow from beside the options, as JSON."""
    schedule = hashlib.blake2b(diffusion.betas.numpy().tobytes(), digest_size=8).hexdigest()
    model_part = {f"model's {name}": value for name, value in network.describe(model).items()}
    return {
        **model_part,
        "the frozen parameters": [name for name, value in model.named_parameters() if not value.requires_grad],
        "the schedule's hash": schedule,
        "the number of images": len(images),
        "the shape of images": list(images.shape),
        "the images' fingerprint": images.fingerprint(),
    }


@contextmanager
def _at_home(device: torch.device) -> Iterator[None]:
    """`device` is the current one, if it is a GPU; the caller's, and their random numbers, stay as they were."""
    cuda = device.type == "cuda"
    with torch.cuda.device(device) if cuda else nullcontext(), torch.random.fork_rng([device] if cuda else []):
        yield


def _to_nobody(text: str) -> None:
    """A report on a rank that has none to give."""
