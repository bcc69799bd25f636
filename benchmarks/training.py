"""python -m benchmarks.training: images a second of `ddpm-ext train` beside a plain loop of PyTorch.

    python -m benchmarks.training --data cifar10/train --table benchmarks/results/training.md

Both train the same U-Net with the same batch size, autocast, AdamW, clipping and moving average, in separate processes,
by turns. The plain loop has all images in memory as tensors; `ddpm-ext train` reads them from the source. A number is
the median over a process's intervals of 8 steps, without the first interval.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu.conftest import machine
from ddpm_ext.base.files import write_text
from ddpm_ext.models.networks import build_unet
from ddpm_ext.tables.schedules import SCHEDULES
from ddpm_ext.training import TrainOptions, train
from ddpm_ext.training.data import labels_of, load_images
from ddpm_ext.training.network import config_of

INTERVAL, INTERVALS = 8, 6  # the steps of an interval, and the number of intervals of a process
COMMON: dict[str, Any] = {"steps": INTERVAL * INTERVALS, "log_every": INTERVAL, "device": "cpu"}


def cases(data: str | None) -> dict[str, TrainOptions]:
    options = {"digits": TrainOptions(timestep_sampler="uniform", **COMMON)}
    if data is not None:
        network = {"widths": (64, 128, 128), "attention": (2,), "head_channels": 64, "groups": 32, "dropout": 0.0}
        about = {"beta_schedule": "cosine", "prediction": "v", "autocast": "bfloat16", "batch_size": 64, "flip": True}
        options["images"] = TrainOptions(
            data=data, classes=True, timestep_sampler="uniform", **network, **about, **COMMON
        )
    return options


class Plain:
    """A training loop as it is commonly written in PyTorch."""

    def __init__(self, options: TrainOptions) -> None:
        self.options, source = options, load_images(options.data, options.image_size)
        self.images = torch.cat([source.batch(part) for part in torch.arange(len(source)).split(1000)])
        self.labels = labels_of(source).numbers if options.classes else None
        classes = None if self.labels is None else int(self.labels.max()) + 2
        self.null_class = None if classes is None else classes - 1
        self.model = build_unet(config_of(options, source.shape, classes)).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), options.lr, fused=True)
        schedule = lambda step: min(1, (step + 1) / options.warmup)  # noqa: E731
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)
        averaged = torch.optim.swa_utils.get_ema_multi_avg_fn(options.ema)
        self.average = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=averaged)
        betas = torch.as_tensor(SCHEDULES[options.beta_schedule](options.timesteps)).float()
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)

    def step(self) -> Tensor:
        options = self.options
        numbers = torch.randint(len(self.images), (options.batch_size,))
        x_start, labels = self.images[numbers], None
        if options.flip:
            x_start = torch.where(torch.rand(len(x_start), 1, 1, 1) < 0.5, x_start.flip(3), x_start)
        if self.labels is not None:
            dropped = torch.rand(len(numbers)) < options.class_dropout
            labels = self.labels[numbers].masked_fill(dropped, self.null_class)
        t = torch.randint(options.timesteps, (len(numbers),))
        noise, level = torch.randn_like(x_start), self.alphas_cumprod[t].view(-1, 1, 1, 1)
        x_t = level.sqrt() * x_start + (1 - level).sqrt() * noise
        target = noise if options.prediction == "eps" else level.sqrt() * noise - (1 - level).sqrt() * x_start
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.autocast == "bfloat16"):
            output = self.model(x_t, t, class_labels=labels).sample
        loss = torch.nn.functional.mse_loss(output.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.model)
        return loss.detach()

    def speeds(self) -> list[float]:
        speeds = []
        for _ in range(INTERVALS):
            start = time.monotonic()
            losses = [self.step() for _ in range(INTERVAL)]
            torch.stack(losses).tolist()
            speeds.append(INTERVAL * self.options.batch_size / (time.monotonic() - start))
        return speeds


def speeds_of_train(options: TrainOptions) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        train(options, folder, report=lambda text: None)
        with open(Path(folder) / "losses.csv", newline="") as opened:
            return [float(row["images_per_second"]) for row in csv.DictReader(opened)][::INTERVAL]


def measured(way: str, case: str, data: str | None) -> dict[str, float]:
    """Measures `way`, "train" or "plain", in a separate process."""
    command = [sys.executable, "-m", "benchmarks.training", "--way", way, "--case", case]
    command += [] if data is None else ["--data", data]
    out: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return out


def run_way(way: str, options: TrainOptions) -> dict[str, float]:
    speeds = speeds_of_train(options) if way == "train" else Plain(options).speeds()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"speed": statistics.median(speeds[1:]), "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder of images in sub-folders of their classes, for the larger network")
    parser.add_argument("--rounds", type=int, default=4, help="processes of each way (default: 4)")
    parser.add_argument("--table", type=Path, help="write the table there")
    parser.add_argument("--way", choices=("train", "plain"), help=argparse.SUPPRESS)  # of a process that measures
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(run_way(options.way, cases(options.data)[options.case])))
        return
    lines = ["# Training", "", *(f"- {line}" for line in machine()[:2]), "- `python -m benchmarks.training`", ""]
    lines += [
        "| run | `ddpm-ext train`, images/s | plain loop, images/s | ratio | memory, plain loop's |",
        "|---|---:|---:|---:|---:|",
    ]
    for case in cases(options.data):
        runs: dict[str, list[dict[str, float]]] = {"train": [], "plain": []}
        for _ in range(options.rounds):
            for way, every in runs.items():
                every.append(measured(way, case, options.data))
        speed = {way: statistics.median(each["speed"] for each in every) for way, every in runs.items()}
        memory = {way: max(each["memory"] for each in every) for way, every in runs.items()}
        cells = f"{speed['train']:.1f} | {speed['plain']:.1f} | {speed['train'] / speed['plain']:.3f}"
        lines.append(f"| {case} | {cells} | {memory['train']:.1f} GiB, {memory['plain']:.1f} GiB |")
        print(lines[-1], flush=True)
    if options.table:
        write_text(options.table, "\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
