"""Tiny models and tiny datasets to train on, in this process or in others that are killed or are ranks.

in_forks starts this file as a process, which forks.
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
# A UNet2DModel's options, and images that fit.
UNET = {"batch_size": 4, "widths": (8,), "attention": (), "groups": 4, "timesteps": 20, "steps": 2, "device": "cpu"}
IMAGES = torch.linspace(-1, 1, 6 * 64).view(6, 1, 8, 8)


class Tiny(nn.Module):
    """model(x, t), with dropout, and with a buffer that changes with every call in training mode."""

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
    """Tiny with a class embedding, of which the last is the null class; remembers the labels that it was given."""

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
    """Squares on a dark ground, drawn with the generators of three libraries at each read."""

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
    """A report that nobody reads."""


def make(out, *, dropout=0.1, width=6, squares=11, model=None, data=None, report=_do_nothing, **options):
    """A Trainer of the tiny module on the squares, unless a model or data are given."""
    options = SIZES | options
    twice = options.get("variance", "fixed_small").startswith("learned")
    if model is None:
        model = Tiny(outputs=2 if twice else 1, dropout=dropout, width=width)
    return Trainer(model, None, Squares(squares) if data is None else data, out, report=report, **options)


def make_unet(out, data=IMAGES, *, report=_do_nothing, **options):
    """A Trainer of a tiny UNet2DModel."""
    return Trainer(None, None, data, out, report=report, **UNET | options)


def features_lost(images, calls=[]):  # noqa: B006
    """Features, which fail in this process's second call: the first one tries them out."""
    calls.append(1)
    return {1: images.flatten(1)}[len(calls)]


def as_arguments(options):
    """The options of `ddpm-ext train` that are these of TrainOptions."""
    texts = {name: ",".join(map(str, value)) if isinstance(value, tuple) else value for name, value in options.items()}
    return [f"--{name.replace('_', '-')}={text}" for name, text in texts.items()]


def before_steps(act) -> None:
    """Calls act(step, images) before each step of this process, and trains on the images that it returns."""
    take = TrainingStep.take
    TrainingStep.take = lambda self, images, labels: take(self, act(self.state.step, images), labels)


def die_after(monkeypatch, steps) -> None:
    """A run in this process ends after this many steps and writes nothing more, as one that is killed."""
    take = TrainingStep.take

    def die(self, images, labels):
        if self.state.step == steps:
            raise SystemExit(9)
        take(self, images, labels)

    monkeypatch.setattr(TrainingStep, "take", die)


def run(folder, *, die_at=None, nan_at=None, signal_at=None, own_group=None, arguments=None, **options) -> None:
    """Trains, or runs `ddpm-ext train` with `arguments`. After this many steps the process is killed (die_at), gets a
    SIGTERM (signal_at) or NaN images (nan_at). own_group: the backend of a process group that exists before."""
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
    """The weights that a run of `make` wrote."""
    from safetensors.torch import load_file

    path = Path(folder) / "model.safetensors"
    return load_file(path if path.exists() else Path(folder) / "unet" / "diffusion_pytorch_model.safetensors")


def assert_same(found, expected) -> None:
    """Tensors by name, or the folders of runs, whose weights they are, have the same names and bits."""
    found, expected = (given if isinstance(given, dict) else weights(given) for given in (found, expected))
    assert found.keys() == expected.keys()
    differ = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not differ


def rows(folder):
    """The lines of a run's losses.csv as numbers."""
    with open(Path(folder) / "losses.csv") as opened:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(opened)]


def in_forks(folder: Path, runs: forks.Runs) -> dict[str, list[int]]:
    """Trains as forks.in_forks says; the options are those of `run`."""
    return forks.in_forks(__file__, folder, runs)


if __name__ == "__main__":
    forks.serve(functools.partial(run, report=print), "torch._dynamo", "matplotlib.figure", "safetensors.torch")
