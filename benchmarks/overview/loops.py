"""Whole loops with real U-Nets: from noise to samples, the model's calls and all that is outside of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_ext import GaussianDiffusion, Philox
from ddpm_ext.base.optional import require
from ddpm_ext.demo.eager import EagerDiffusion
from ddpm_ext.models import load_model

DIGITS, CIFAR = "digits, 64x1x8x8, 0.9 M parameters", "DDPM's CIFAR-10 U-Net, 8x3x32x32, 35.7 M parameters"
SHORT = 20  # steps of the loops that are not run whole


@dataclass(frozen=True)
class Timed:
    """A loop of `steps` model calls. Where fewer were run, the seconds are in proportion."""

    model: str
    way: str
    steps: int
    seconds: float
    outside: float  # seconds of them that the model did not take


class Clocked:
    """A U-Net of diffusers as a function, which counts the seconds of its calls."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.unet, self.seconds = unet.eval(), 0.0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        begin = time.perf_counter()
        result = self.unet(x, t).sample
        self.seconds += time.perf_counter() - begin
        return result


def eager_loop(model: Clocked, shape: tuple[int, ...], steps: int) -> None:
    eager, x = EagerDiffusion(), torch.randn(shape)
    for i in reversed(range(1000 - steps, 1000)):
        t = torch.full(shape[:1], i)
        x = eager.p_sample(model(x, t), x, t)


def diffusers_loop(model: Clocked, shape: tuple[int, ...], steps: int) -> None:
    scheduler = require("diffusers", "the benchmark").DDPMScheduler(1000)
    scheduler.set_timesteps(1000)
    x = torch.randn(shape)
    for t in scheduler.timesteps[:steps]:
        x = scheduler.step(model(x, t), t, x).prev_sample


def our_loop(sampler: str, whole: int) -> Callable[[Clocked, tuple[int, ...], int], None]:
    def loop(model: Clocked, shape: tuple[int, ...], steps: int) -> None:
        timesteps = torch.arange(999, 999 - steps, -1) if steps < whole else None
        chosen = {"timesteps": timesteps} if timesteps is not None else {"steps": steps, "spacing": "trailing"}
        gd = GaussianDiffusion(1000)
        gd.p_sample_loop(
            model, shape, sampler=sampler, rng=Philox(0), record="last", progress=False, device="cpu", **chosen
        )

    return loop


WAYS = {
    "eager PyTorch, ddpm": (eager_loop, 1000),
    "diffusers, ddpm": (diffusers_loop, 1000),
    "ddpm_ext, ddpm": (our_loop("ddpm", 1000), 1000),
    "ddpm_ext, dpmpp_2m": (our_loop("dpmpp_2m", 20), 20),
}


def cifar_unet() -> torch.nn.Module:
    """The architecture of Ho et al. 2020 for CIFAR-10, appendix B, with random weights."""
    return require("diffusers", "the benchmark").UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        act_fn="silu",
    )


@torch.no_grad()
def run(rounds: int) -> Iterator[Timed]:
    """Each way's median of `rounds` loops, one of each way in turn."""
    models = ((DIGITS, load_model("digits").unet, (64, 1, 8, 8), 1000), (CIFAR, cifar_unet(), (8, 3, 32, 32), SHORT))
    for name, unet, shape, most in models:
        model = Clocked(unet)
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way, (loop, steps) in WAYS.items():
                model.seconds, begin = 0.0, time.perf_counter()
                loop(model, shape, min(steps, most))
                seconds = time.perf_counter() - begin
                times[way].append((seconds, seconds - model.seconds))
        for way, (_, steps) in WAYS.items():
            taken = min(steps, most)
            total, outside = (statistics.median(each) * steps / taken for each in zip(*times[way], strict=True))
            yield Timed(name, way, steps, total, outside)


def table(timed: list[Timed]) -> list[str]:
    lines = [
        "## Whole loops with a U-Net",
        "",
        "Medians of the seconds of a loop, float32, from noise to samples. Of 1,000 steps with the large model, "
        f"{SHORT} were timed. Outside: the seconds that the model did not take. The U-Net for CIFAR-10 has random "
        "weights, which changes no time.",
        "",
        "| model, batch | loop | calls of the model | seconds | outside the model | eager / this |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for each in timed:
        (eager,) = (other.seconds for other in timed if other.model == each.model and other.way.startswith("eager"))
        seconds, outside = (f"{time:,.0f}" if time >= 100 else f"{time:.2g}" for time in (each.seconds, each.outside))
        cells = f"{each.steps:,} | {seconds} | {outside} | {eager / each.seconds:.2f}"
        lines.append(f"| {each.model} | {each.way} | {cells} |")
    return lines
