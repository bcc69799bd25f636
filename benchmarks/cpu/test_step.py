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


def chained(step):
    """A loop's step: each result is the next one's input, and is allocated while the last one is alive."""
    last = []

    def function(x, m, t):
        last[:] = [step(last[0] if last else x, m, t)]

    return function


@torch.no_grad()
def test_fused_chained(run):
    gd, rng = GaussianDiffusion(), Philox(0)
    run("ddpm_ext, chained", chained(lambda x, m, t: gd.p_sample(lambda *_: m, x, t, rng=rng)))


@torch.no_grad()
def test_fused_int(run):
    gd, rng = GaussianDiffusion(), Philox(0)
    run("ddpm_ext, t an int", lambda x, m, t: gd.p_sample(lambda *_: m, x, T, rng=rng))


@torch.no_grad()
def test_eager_chained(run):
    eager = EagerDiffusion()
    run("eager, chained", chained(lambda x, m, t: eager.p_sample(m, x, t)))


def with_temporaries(x, m):
    """A model that makes three tensors, of which the last is its output."""
    return x * 0.5 + m - 0.1


@pytest.fixture
def run_behind_a_model(benchmark, shape, run):
    benchmark.group = f"p_sample behind a model {'x'.join(map(str, shape))}"
    return run


@torch.no_grad()
def test_behind_a_model_fused(run_behind_a_model):
    gd, rng = GaussianDiffusion(), Philox(0)
    step = chained(lambda x, m, t: gd.p_sample(lambda x, t: with_temporaries(x, m), x, t, rng=rng))
    run_behind_a_model("ddpm_ext, chained", step)


@torch.no_grad()
def test_behind_a_model_eager(run_behind_a_model):
    eager = EagerDiffusion()
    run_behind_a_model("eager, chained", chained(lambda x, m, t: eager.p_sample(with_temporaries(x, m), x, t)))


@torch.no_grad()
def test_behind_a_model_alone(run_behind_a_model):
    run_behind_a_model("the model alone", lambda x, m, t: with_temporaries(x, m))


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
