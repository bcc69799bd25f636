"""Operators whose tensors are contiguous, channels_last, or some of both, which the way's name says."""

from __future__ import annotations

import math

import pytest
import torch

from ddpm_ext import Philox, ops
from ddpm_ext.tables.step_table import StepTable

F32, F16 = torch.float32, torch.float16
OF_IMAGES = [(8, 4, 64, 64), (4, 3, 256, 256)]
OF_MANY_CHANNELS = [(8, 8, 64, 64), (8, 12, 64, 64), (8, 16, 64, 64), (2, 32, 64, 64)]
CASES = [(shape, F32) for shape in OF_IMAGES] + [(shape, dtype) for shape in OF_MANY_CHANNELS for dtype in (F32, F16)]
# Which of the sample, the model's output, that without its condition, and the noise are channels_last.
WAYS = {"contiguous": "", "channels_last": "xmuz", "samples channels_last": "xz", "outputs channels_last": "mu"}
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


@pytest.mark.benchmark(max_time=0.1)  # there are hundreds
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=name_of)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_layouts(benchmark, shape, dtype, operator, way):
    memory = {name: torch.channels_last if name in WAYS[way] else torch.contiguous_format for name in "xmuz"}
    given = [torch.randn(shape).to(dtype, memory_format=memory[name], copy=True) for name in "xmuz"]
    benchmark.group = f"{operator} {name_of(shape)}" + (f" {name_of(dtype)}" if dtype != F32 else "")
    benchmark.extra_info.update(way=way, elements=math.prod(shape))
    benchmark(OPERATORS[operator], *given)
