"""Runs of a Trainer with tiny models and data, in this process or in forked processes that are killed or are ranks.

in_forks starts this file as a script.
"""

import csv
import functools
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from support import forks
from torch import nn
from torch.utils.data import Dataset

from ddpm_ext.training import Trainer
from ddpm_ext.training.step import TrainingStep

SIZES = {"steps": 60, "batch_size": 6, "timesteps": 20, "warmup": 4, "checkpoint_every": 10, "log_every": 7}
SIZES |= {"device": "cpu"}
# The options of a run with a UNet2DModel, and its images.
UNET = {"batch_size": 4, "widths": (8,), "attention": (), "groups": 4, "timesteps": 20, "steps": 2, "device": "cpu"}
IMAGES = torch.linspace(-1, 1, 6 * 64).view(6, 1, 8, 8)


class Tiny(nn.Module):
    """A model of x and t with dropout. Its buffer counts the calls in training mode."""

    def __init__(self, channels: int = 1, outputs: int | None = None, dropout: float = 0.1, width: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.into = nn.Conv2d(channels, width, 3, padding=1)
        self.out = nn.Conv2d(width, outputs or channels, 3, padding=1)
        self.time, self.dropout = nn.Linear(1, width), nn.Dropout(dropout)
        with torch.no_grad():
            for value in self.parameters():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x, t):
        self.calls += self.training
        hidden = self.into(x) + self.time(t.to(x.dtype).view(-1, 1) / 20 - 0.5)[..., None, None]
        return self.out(self.dropout(torch.nn.functional.silu(hidden)))


class Conditional(Tiny):
    """Tiny with a class embedding, whose last class is the null class. `seen` has the labels of all training calls."""

    def __init__(self, classes: int = 5, **sizes) -> None:
        super().__init__(**sizes)
        self.of_class = nn.Embedding(classes, 1)
        nn.init.normal_(self.of_class.weight, generator=torch.Generator().manual_seed(6))
        self.seen = []

    def forward(self, x, t, y):
        if self.training:
            self.seen += y.tolist()
        return super().forward(x, t) + self.of_class(y)[..., None, None]


class Squares(Dataset):
    """Images of squares. Each access draws an image with the generators of torch, Python and numpy."""

    def __init__(self, count: int = 11, size: int = 8) -> None:
        self.count, self.size = count, size

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = torch.full((1, self.size, self.size), -1.0)
        top, left = int(torch.randint(5, ())), random.randrange(5)
        image[:, top : top + 3, left : left + 3] = 2 * index / self.count - 1 + 0.1 * np.random.rand()
        return image, index


def _do_nothing(text: str) -> None:
    """Ignores a line of the report."""


def make(out, *, dropout=0.1, width=6, squares=11, model=None, data=None, report=_do_nothing, **options):
    """A Trainer of `model` on `data`, by default of a Tiny on Squares."""
    options = SIZES | options
    twice = options.get("variance", "fixed_small").startswith("learned")
    if model is None:
        model = Tiny(outputs=2 if twice else 1, dropout=dropout, width=width)
    return Trainer(model, None, Squares(squares) if data is None else data, out, report=report, **options)


def make_unet(out, data=IMAGES, *, report=_do_nothing, **options):
    """A Trainer of a tiny UNet2DModel."""
    return Trainer(None, None, data, out, report=report, **UNET | options)


def features_lost(images, calls=[]):  # noqa: B006
    """Features of images. The second call in a process raises an error; the first one is the Trainer's trial."""
    calls.append(1)
    return {1: images.flatten(1)}[len(calls)]


def as_arguments(options):
    """Options of TrainOptions as arguments of `ddpm-ext train`."""
    texts = {name: ",".join(map(str, value)) if isinstance(value, tuple) else value for name, value in options.items()}
    return [f"--{name.replace('_', '-')}={text}" for name, text in texts.items()]


def before_steps(act) -> None:
    """Makes every Trainer of this process call act(step, images) before each step, and train on the returned images."""
    take = TrainingStep.take
    TrainingStep.take = lambda self, images, labels: take(self, act(self.state.step, images), labels)


def die_after(monkeypatch, steps) -> None:
    """Makes a run in this process end after this number of steps, without writing more, like a killed process."""
    take = TrainingStep.take

    def die(self, images, labels):
        if self.state.step == steps:
            raise SystemExit(9)
        take(self, images, labels)

    monkeypatch.setattr(TrainingStep, "take", die)


def run(folder, *, die_at=None, nan_at=None, signal_at=None, own_group=None, arguments=None, **options) -> None:
    """Trains with the Trainer of `make`, or with `arguments` by the command `ddpm-ext train`.

    die_at, signal_at, nan_at: the number of steps after which the process kills itself, gets a SIGTERM, or gets NaN
        images. own_group: the backend of a process group that the process creates before it trains.
    """
    if arguments is not None:
        from ddpm_ext import cli

        sys.exit(cli.main(["train", *arguments, "--out", str(folder)]))
    if own_group:
        torch.distributed.init_process_group(own_group)

    def act(step, images):
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == signal_at:
            signal.raise_signal(signal.SIGTERM)
        return images * torch.nan if step == nan_at else images

    before_steps(act)
    if options.get("features") == "lost":
        options["features"] = features_lost
    make(folder, **options).fit()
    if own_group and torch.distributed.is_initialized():
        print("the group still exists")


def weights(folder):
    """The weights in the folder of a run, by name."""
    from safetensors.torch import load_file

    path = Path(folder) / "model.safetensors"
    return load_file(path if path.exists() else Path(folder) / "unet" / "diffusion_pytorch_model.safetensors")


def assert_same(found, expected) -> None:
    """Checks that two dicts of tensors have the same names and values. A folder stands for the weights of its run."""
    found, expected = (given if isinstance(given, dict) else weights(given) for given in (found, expected))
    assert found.keys() == expected.keys()
    differ = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not differ


def rows(folder):
    """The lines of a run's losses.csv, as dicts of numbers."""
    with open(Path(folder) / "losses.csv") as opened:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(opened)]


def in_forks(folder: Path, runs: forks.Runs) -> dict[str, list[int]]:
    """Trains in forked processes (forks.in_forks). The options in `runs` are those of `run`."""
    return forks.in_forks(__file__, folder, runs)


if __name__ == "__main__":
    forks.serve(functools.partial(run, report=print), "torch._dynamo", "matplotlib.figure", "safetensors.torch")
