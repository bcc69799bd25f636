"""A tiny module and a tiny dataset to train on, in this process or in others that are killed or are ranks.

in_forks starts this file as a process, which imports once and then forks: imports are slow.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from support.command_line import ENVIRONMENT
from support.ports import reserved_port
from torch import nn
from torch.utils.data import Dataset

from ddpm_ext.training import Trainer
from ddpm_ext.training.step import TrainingStep

SIZES = {"steps": 60, "batch_size": 6, "timesteps": 20, "warmup": 4, "checkpoint_every": 10, "log_every": 7}
SIZES |= {"device": "cpu"}


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


def before_steps(act) -> None:
    """Calls act(step, images) before each step of this process, and trains on the images that it returns."""
    take = TrainingStep.take
    TrainingStep.take = lambda self, images, labels: take(self, act(self.state.step, images), labels)


def run(folder, *, die_at=None, nan_at=None, signal_at=None, own_group=None, **options) -> None:
    """Trains.

    Args:
        die_at: the process is killed after so many steps.
        nan_at: the images of the step after so many are NaN.
        signal_at: the process gets SIGTERM after so many steps.
        own_group: the backend of a process group that exists before training.
    """
    if own_group:
        torch.distributed.init_process_group(own_group)

    def act(step, images):
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == signal_at:
            signal.raise_signal(signal.SIGTERM)
        return images * torch.nan if step == nan_at else images

    before_steps(act)
    make(folder, **options).fit()
    if own_group and torch.distributed.is_initialized():
        print("the group still exists")


def weights(folder):
    """The weights that a run of `make` wrote."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def _fork(folder: Path, rank: int, size: int, port: int, options: dict) -> int:
    """Starts a process that trains in `folder`/run and writes its output beside it; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
            os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), stream.fileno())
        if size > 1:
            ours = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in ours.items()})
        run(folder / "run", report=print, **options)
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _codes(folder: Path, by_rank: list[dict]) -> list[int]:
    """The exit code of each rank of a run, or minus the signal that killed it."""
    folder.mkdir(exist_ok=True)
    with reserved_port() as port:
        children = [_fork(folder, rank, len(by_rank), port, options) for rank, options in enumerate(by_rank)]
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def in_forks(folder: Path, runs: dict[str, list[dict]], timeout: float = 1200) -> dict[str, list[int]]:
    """Trains runs one after the other, each given by a name and the options of its ranks.

    The folder of a run is `folder`/name/run; the output of rank 0 is in `folder`/name/0.out and 0.err.

    Returns:
        The exit codes of the ranks by name, as _codes.
    """
    command = [sys.executable, __file__, str(folder), json.dumps(runs)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for module in ("torch._dynamo", "torch.distributed", "matplotlib.figure", "safetensors.torch"):
        importlib.import_module(module)  # a run imports them; here once for all forks
    wanted = json.loads(sys.argv[2])
    print(json.dumps({name: _codes(Path(sys.argv[1]) / name, by_rank) for name, by_rank in wanted.items()}))
