"""Operators whose tensors are contiguous, channels_last, or some of both, which the way's name says."""

from __future__ import annotations

import math

import pytest
import torch

from ddpm_ext import Philox, ops
from ddpm_ext.tables.step_table import StepTable

F32, F16 = torch.float32, torch.float16
OF_IMAGES = [(8, 4, 64, 64), (4, 3, 256, 256)]
OF_OTHER_CHANNELS = [*((8, channels, 64, 64) for channels in (2, 5, 6, 7, 8, 12, 16)), (2, 32, 64, 64)]
CASES = [(shape, F32) for shape in OF_IMAGES] + [(shape, dtype) for shape in OF_OTHER_CHANNELS for dtype in (F32, F16)]
# Which of the sample, the model's output, that without its condition, and the noise are channels_last.
WAYS = {"contiguous": "", "channels_last": "xmuz", "samples channels_last": "xz", "outputs channels_last": "mu"}
OF_HALVES = [(8, 3, 64, 64), (8, 4, 64, 64), (4, 3, 256, 256)]
HALVES = ["reverse_step", "reverse_step, noise drawn", "guided step"]
RNG = Philox(0)
STEPS = StepTable([0], a=[1.5], b=[-1.1], c0=[0.3], c1=[0.7], s=[0.1]).packed("cpu", guidance=[3.0])
FORWARD = torch.tensor([[0.6, 0.8]])
LOSS = torch.tensor([[0.0, 1.0, 1.0, 0.0]])

OPERATORS = {
    "reverse_step": lambda x, m, u, z: ops.reverse_step(x, m, STEPS, 0, add_noise=False),
    "reverse_step, noise given": lambda x, m, u, z: ops.reverse_step(x, m, STEPS, 0, noise=z),
    "reverse_step, noise drawn": lambda x, m, u, z: ops.reverse_step(x, m, STEPS, 0, rng=RNG),
    "guided step": lambda x, m, u, z: ops.step_with_options(x, m, STEPS, 0, uncond_output=u, add_noise=False),
    "guided step, noise drawn": lambda x, m, u, z: ops.step_with_options(x, m, STEPS, 0, uncond_output=u, rng=RNG),
    "forward_process": lambda x, m, u, z: ops.forward_process(x, FORWARD, 0, noise=m),
    "forward_process, noise drawn": lambda x, m, u, z: ops.forward_process(x, FORWARD, 0, rng=RNG),
    "x_start_scale": lambda x, m, u, z: ops.x_start_scale(x, m, STEPS, 0, quantile=0.995),
    "output_scale": lambda x, m, u, z: ops.output_scale(m, z, guidance=3.0, rescale=0.7),
    "diffusion_loss": lambda x, m, u, z: ops.diffusion_loss(m, x, LOSS, 0, noise=z),
}


def name_of(case):
    return "x".join(map(str, case)) if isinstance(case, tuple) else str(case).removeprefix("torch.")


def measure(benchmark, shape, dtype, operator, way, what, given):
    benchmark.group = f"{operator}{what} {name_of(shape)}" + (f" {name_of(dtype)}" if dtype != F32 else "")
    benchmark.extra_info.update(way=way, elements=math.prod(shape))
    benchmark(OPERATORS[operator], *given)


@pytest.mark.benchmark(max_time=0.1)  # there are hundreds
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=name_of)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_layouts(benchmark, shape, dtype, operator, way):
    memory = {name: torch.channels_last if name in WAYS[way] else torch.contiguous_format for name in "xmuz"}
    given = [torch.randn(shape).to(dtype, memory_format=memory[name], copy=True) for name in "xmuz"]
    measure(benchmark, shape, dtype, operator, way, "", given)


@pytest.mark.benchmark(max_time=0.1)
@pytest.mark.parametrize("dtype", [F32, F16], ids=name_of)
@pytest.mark.parametrize("shape", OF_HALVES, ids=name_of)
@pytest.mark.parametrize("way", ["contiguous", "channels_last", "outputs channels_last"])
@pytest.mark.parametrize("operator", HALVES)
def test_halves(benchmark, shape, dtype, operator, way):
    """Of outputs with twice the channels, as those of a learned variance, the first half is given."""
    memory = {name: torch.channels_last if name in WAYS[way] else torch.contiguous_format for name in "xmuz"}
    batch, channels, *image = shape
    sizes = {name: (batch, channels * (2 if name in "mu" else 1), *image) for name in "xmuz"}
    given = [torch.randn(sizes[name]).to(dtype, memory_format=memory[name], copy=True)[:, :channels] for name in "xmuz"]
    measure(benchmark, shape, dtype, operator, way, ", half of the outputs", given)
