"""Trains a UNet2DModel. A run that is killed and resumed ends with the same weights as one that never stopped.

Nothing random is kept between two steps: the order of the images, the timesteps, the noise and the dropout of a step
all follow from (seed, step). So a checkpoint is only tensors and a few numbers, in one safetensors file.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_ext import checkpoints, files
from ddpm_ext.data import Images, load_images
from ddpm_ext.extras import require
from ddpm_ext.models import build_unet, save_model
from ddpm_ext.models.scheduler import DiffusionSettings
from ddpm_ext.noise import Philox
from ddpm_ext.seeds import generator, seed_for

__all__ = ["Result", "TrainOptions", "train"]

# What may change when a run is resumed: nothing that reaches the weights.
_FREE = frozenset({"checkpoint_every", "log_every", "keep", "device", "weights_dtype"})
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainOptions:
    """What determines a training run. Lists of widths and levels are tuples; see `ddpm-ext train --help`."""

    data: str = "digits"
    image_size: int | None = None
    channels: int | None = None
    flip: bool = False
    steps: int = 5000
    batch_size: int = 128
    lr: float = 2e-3
    warmup: int = 300
    weight_decay: float = 0.01
    ema: float = 0.999
    seed: int = 0
    widths: tuple[int, ...] = (32, 48, 64)
    layers: int = 1
    attention: tuple[int, ...] = (1,)
    groups: int = 8
    dropout: float = 0.1
    timesteps: int = 1000
    beta_schedule: str = "linear"
    prediction: str = "eps"
    checkpoint_every: int = 500
    log_every: int = 100
    keep: int = 2
    device: str = "cpu"
    weights_dtype: str = "float32"

    def __post_init__(self) -> None:
        whole = ("steps", "batch_size", "layers", "groups", "timesteps", "checkpoint_every", "log_every", "keep")
        for name in whole:
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _require("warmup", self.warmup, self.warmup >= 0, "at least 0")
        _require("lr", self.lr, math.isfinite(self.lr) and self.lr > 0, "a positive number")
        _require("weight_decay", self.weight_decay, math.isfinite(self.weight_decay) and self.weight_decay >= 0, ">= 0")
        _require("ema", self.ema, 0 <= self.ema < 1, "in [0, 1)")
        _require("dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)")
        _require("seed", self.seed, 0 <= self.seed < 2**64, "in [0, 2^64)")
        _require("widths", self.widths, bool(self.widths) and min(self.widths) >= 1, "one positive number a level")
        for width in self.widths:
            _require("widths", width, width % self.groups == 0, f"multiples of groups, {self.groups}")
        for level in self.attention:
            _require("attention", level, 0 <= level < len(self.widths), f"levels in [0, {len(self.widths)})")
        _require("weights_dtype", self.weights_dtype, self.weights_dtype in _DTYPES, "one of " + ", ".join(_DTYPES))
        if self.flip and self.data == "digits":
            raise ValueError("flip: digits are not to be mirrored")


@dataclass(frozen=True)
class Result:
    """How a run ended: its folder, number of parameters, mean loss of the last steps, seconds of this process."""

    folder: Path
    parameters: int
    final_loss: float
    seconds: float


class _Run:
    """One run's tensors: the model, its moving average, the optimizer, the losses so far."""

    def __init__(self, options: TrainOptions, images: Images) -> None:
        self.options, self.images = options, images
        self.device = torch.device(options.device)
        self.settings = DiffusionSettings(options.timesteps, options.beta_schedule, options.prediction)
        self.diffusion = self.settings.diffusion()
        torch.manual_seed(seed_for(options.seed, "weights"))
        self.unet = build_unet(unet_config(options, images.shape)).to(self.device).train()
        self.average = copy.deepcopy(self.unet).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=True
        )
        self.losses: list[float] = []
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def step(self) -> float:
        """Takes the step that comes next and returns its loss."""
        options, step = self.options, len(self.losses)
        torch.manual_seed(seed_for(options.seed, "dropout", step))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(options, step)
        x_start = self._batch(step).to(self.device)
        t = timesteps_of(options, step).to(self.device)
        loss = self.diffusion.train_losses(self.unet, x_start, t, rng=Philox(options.seed, draw=step))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        # A short memory at first, so that the fresh weights are soon forgotten.
        decay = min(options.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.unet.parameters()), 1 - decay)
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(f"training: the loss is {value} at step {step}; a lower lr may help")
        self.losses.append(value)
        return value

    def _batch(self, step: int) -> Tensor:
        """The images of a step: the set is gone through in an order drawn anew each time, across batches' borders."""
        options, count = self.options, len(self.images)
        indices = torch.empty(options.batch_size, dtype=torch.int64)
        for row in range(options.batch_size):
            epoch, place = divmod(step * options.batch_size + row, count)
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = torch.randperm(count, generator=generator(options.seed, "order", epoch))
            indices[row] = self._order[place]
        images = self.images.batch(indices)
        if options.flip:
            mirrored = torch.rand(len(images), generator=generator(options.seed, "flip", step)) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        return images

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step needs, by name."""
        state = {f"model.{name}": value for name, value in self.unet.state_dict().items()}
        state |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        names = [name for name, _ in self.unet.named_parameters()]
        for index, slots in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{slot}.{names[index]}": value for slot, value in slots.items()}
        return state | {"losses": torch.tensor(self.losses, dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor], path: Path) -> None:
        """Takes up `state`; raises ValueError, naming the file, if it is another model's."""
        try:
            self.unet.load_state_dict(checkpoints.part(state, "model."))
            self.average.load_state_dict(checkpoints.part(state, "average."))
            optimizer = self.optimizer.state_dict()
            slots = {slot: checkpoints.part(state, f"optimizer.{slot}.") for slot in ("step", "exp_avg", "exp_avg_sq")}
            optimizer["state"] = {
                index: {slot: values[name] for slot, values in slots.items()}
                for index, (name, _) in enumerate(self.unet.named_parameters())
            }
            self.optimizer.load_state_dict(optimizer)
            self.losses = state["losses"].tolist()
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"resume: {path} holds the state of another model") from error


def train(
    options: TrainOptions,
    out: str | Path,
    *,
    resume: bool = False,
    command: str = "",
    report: Callable[[str], None] = print,
) -> Result:
    """Trains on `options.data` and writes the model to the folder `out`, in diffusers' layout.

    Beside it stand training.json (options, versions, final loss), losses.csv, losses.png, and in checkpoints/ the last
    `options.keep` checkpoints, one every `options.checkpoint_every` steps. With `resume` it goes on from the newest, or
    starts where there is none. `report` gets a line every `options.log_every` steps.

    Raises ValueError for options that don't fit, for a folder that holds a run already (without `resume`) or one with
    other options (with it), and for a loss that is not finite.
    """
    from ddpm_ext import records

    require("matplotlib.figure", "the curve of losses")
    folder = Path(out)
    newest = checkpoints.newest(folder)
    if not resume and (newest is not None or (folder / "config.json").exists()):
        raise ValueError(f"out: {folder} holds a run already; resume it, or give another folder")
    started = time.monotonic()
    devices = [torch.device(options.device)] if torch.device(options.device).type == "cuda" else []
    with torch.random.fork_rng(devices):  # the caller's random numbers stay as they were
        run = _Run(options, load_images(options.data, options.image_size, options.channels))
        files.check_writable(folder / "training.json")  # only now, since it makes the folder
        if newest is not None:
            state, was = checkpoints.load(newest)
            check_same(options, was, newest)
            run.restore(state, newest)
            report(f"resumed at step {len(run.losses)} from {newest}")
        parameters = sum(value.numel() for value in run.unet.parameters())
        report(f"{parameters:,} parameters, {len(run.images):,} images of shape {run.images.shape}, on {run.device}")
        begun, begun_at = len(run.losses), time.monotonic()
        while len(run.losses) < options.steps:
            run.step()
            step = len(run.losses)
            if step % options.log_every == 0 or step == options.steps:
                speed = (step - begun) / (time.monotonic() - begun_at)
                report(records.line(run.losses, options, learning_rate(options, step - 1), speed))
            if step % options.checkpoint_every == 0 and step < options.steps:
                checkpoints.save(folder, step, run.state(), asdict(options), options.keep)
                records.write_losses(folder, run.losses)
        checkpoints.save(folder, options.steps, run.state(), asdict(options), options.keep)
        records.write_losses(folder, run.losses, plot=True)
        save_model(run.average, run.settings, folder, dtype=_DTYPES[options.weights_dtype])
    result = Result(folder, parameters, records.final_loss(run.losses), time.monotonic() - started)
    records.write_training(folder, options, result, len(run.images), begun, command)
    return result


def unet_config(options: TrainOptions, shape: tuple[int, int, int]) -> dict[str, Any]:
    """The UNet2DModel's configuration for images of `shape`, (channels, height, width)."""
    channels, height, width = shape
    smallest = 2 ** (len(options.widths) - 1)
    if height % smallest or width % smallest:
        raise ValueError(
            f"image size: got {height}, expected a multiple of {smallest} for {len(options.widths)} widths"
        )
    levels = range(len(options.widths))
    return {
        "_class_name": "UNet2DModel",
        "sample_size": height,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": list(options.widths),
        "layers_per_block": options.layers,
        "down_block_types": ["AttnDownBlock2D" if i in options.attention else "DownBlock2D" for i in levels],
        "up_block_types": ["AttnUpBlock2D" if i in options.attention else "UpBlock2D" for i in reversed(levels)],
        "norm_num_groups": options.groups,
        "attention_head_dim": 8,
        "dropout": options.dropout,
    }


def learning_rate(options: TrainOptions, step: int) -> float:
    """Rises over `warmup` steps, then falls along half a cosine to nothing at the end."""
    rise = min(1.0, (step + 1) / max(1, options.warmup))
    return options.lr * rise * 0.5 * (1 + math.cos(math.pi * step / options.steps))


def timesteps_of(options: TrainOptions, step: int) -> Tensor:
    """(batch,) int64: one from each of as many equal stretches of [0, timesteps) as the batch has rows.

    Together they are uniform, and the loss varies less from step to step than with independent ones.
    """
    places = torch.rand(options.batch_size, dtype=torch.float64, generator=generator(options.seed, "timesteps", step))
    places = (torch.arange(options.batch_size) + places) * (options.timesteps / options.batch_size)
    return places.long().clamp(max=options.timesteps - 1)


def check_same(options: TrainOptions, was: dict[str, Any], path: Path) -> None:
    """Raises ValueError, naming the first option that differs from the checkpoint's."""
    for field in fields(options):
        now, then = getattr(options, field.name), was.get(field.name)
        if field.name not in _FREE and now != (tuple(then) if isinstance(then, list) else then):
            raise ValueError(f"resume: {field.name} is {now}, but {path} was made with {then}")


def with_defaults_of(was: dict[str, Any], given: dict[str, Any]) -> TrainOptions:
    """A checkpoint's options with what is `given` in their place."""
    known = {field.name for field in fields(TrainOptions)}
    old: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in was.items() if name in known
    }
    return replace(TrainOptions(**old), **given)


def _require(name: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"{name}: got {value}, expected {expected}")
