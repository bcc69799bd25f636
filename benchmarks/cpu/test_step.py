"""One reverse step without the model's call; the noise is drawn in the step."""

from __future__ import annotations

import math

import pytest
import torch

from ddpm_ext import GaussianDiffusion, Philox
from ddpm_ext.demo.eager import EagerDiffusion

T = 500


@pytest.fixture
def run(benchmark, shape):
    x_t, model_output = torch.randn(shape), torch.randn(shape)
    t = torch.full(shape[:1], T)
    benchmark.group = f"p_sample {'x'.join(map(str, shape))}"

    def measure(way, function):
        benchmark.extra_info.update(way=way, elements=math.prod(shape))
        benchmark(function, x_t, model_output, t)

    return measure


@torch.no_grad()
def test_fused(run):
    gd, rng = GaussianDiffusion(), Philox(0)
    run("ddpm_ext", lambda x, m, t: gd.p_sample(lambda *_: m, x, t, rng=rng))


@torch.no_grad()
def test_fused_out(run, shape):
    gd, rng, out = GaussianDiffusion(), Philox(0), torch.empty(shape)
    run("ddpm_ext, out=", lambda x, m, t: gd.p_sample(lambda *_: m, x, t, rng=rng, out=out))


@torch.no_grad()
def test_eager(run):
    eager = EagerDiffusion()
    run("eager", lambda x, m, t: eager.p_sample(m, x, t))


@torch.no_grad()
def test_compiled(run):
    torch._dynamo.reset()
    compiled = torch.compile(EagerDiffusion().p_sample)
    run("torch.compile", lambda x, m, t: compiled(m, x, t))


@torch.no_grad()
def test_diffusers(run):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    run("diffusers", lambda x, m, t: scheduler.step(m, T, x, return_dict=False))


def test_floor(run, shape):
    """Only the memory traffic that a step cannot avoid: two tensors are read and one is written."""
    out = torch.empty(shape)
    run("torch.add(out=)", lambda x, m, t: torch.add(x, m, out=out))
