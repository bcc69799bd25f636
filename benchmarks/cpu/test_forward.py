"""The forward process with noise drawn inside the step, and the noise alone."""

from __future__ import annotations

import math

import pytest
import torch

from ddpm_ext import GaussianDiffusion, Philox, randn
from ddpm_ext.demo.eager import EagerDiffusion


@pytest.fixture
def run(benchmark, shape):
    x_start, t = torch.randn(shape), torch.randint(0, 1000, shape[:1])

    def measure(operation, way, function):
        benchmark.group = f"{operation} {'x'.join(map(str, shape))}"
        benchmark.extra_info.update(way=way, elements=math.prod(shape))
        benchmark(function, x_start, t)

    return measure


def test_q_sample_fused(run):
    gd, rng = GaussianDiffusion(), Philox(0)
    run("q_sample", "ddpm_ext", lambda x, t: gd.q_sample(x, t, rng=rng))


def test_q_sample_eager(run):
    eager = EagerDiffusion()
    run("q_sample", "eager", lambda x, t: eager.q_sample(x, t))


def test_q_sample_compiled(run):
    torch._dynamo.reset()
    compiled = torch.compile(EagerDiffusion().q_sample)
    run("q_sample", "torch.compile", lambda x, t: compiled(x, t))


def test_q_sample_diffusers(run):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    run("q_sample", "diffusers", lambda x, t: scheduler.add_noise(x, torch.randn_like(x), t))


def test_randn_fused(run):
    rng = Philox(0)
    run("randn", "ddpm_ext", lambda x, t: randn(x.shape, rng))


def test_randn_eager(run):
    run("randn", "eager", lambda x, t: torch.randn(x.shape))
