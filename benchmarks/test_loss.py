"""A step of training outside the model: x_t made, the loss of a given output, and its gradient there."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ddpm_ext import GaussianDiffusion, Philox


@pytest.fixture(params=[(64, 3, 32, 32), (16, 3, 256, 256)], ids=lambda shape: "x".join(map(str, shape)))
def shape(request):
    return request.param


@pytest.fixture(params=["eps", "x0", "v"])
def prediction(request):
    return request.param


@pytest.fixture
def run(benchmark, shape, prediction):
    x_start, model_output = torch.randn(shape), torch.randn(shape, requires_grad=True)
    t = torch.randint(1000, shape[:1])
    benchmark.group = f"train_losses {prediction} {'x'.join(map(str, shape))}"

    def measure(way, loss):
        benchmark.extra_info.update(way=way, elements=math.prod(shape))

        def step():
            model_output.grad = None
            loss(x_start, model_output, t).backward()

        benchmark(step)

    return measure


class Eager:
    """As the tutorials write it; x_t is handed out, so that a compiler makes it, too."""

    def __init__(self, prediction):
        gd = GaussianDiffusion()
        self.prediction = prediction
        self.signal, self.noise = gd.sqrt_alphas_cumprod.float(), gd.sqrt_one_minus_alphas_cumprod.float()

    def __call__(self, x_start, model_output, t):
        signal, noise = (table[t].reshape(-1, 1, 1, 1) for table in (self.signal, self.noise))
        z = torch.randn_like(x_start)
        x_t = signal * x_start + noise * z
        target = {"eps": lambda: z, "x0": lambda: x_start, "v": lambda: signal * z - noise * x_start}[self.prediction]()
        return F.mse_loss(model_output, target), x_t


def test_fused(run, prediction):
    gd, rng = GaussianDiffusion(prediction=prediction), Philox(0)
    run("ddpm_ext", lambda x, m, t: gd.train_losses(lambda *_: m, x, t, rng=rng))


def test_eager(run, prediction):
    eager = Eager(prediction)
    run("eager", lambda x, m, t: eager(x, m, t)[0])


def test_compiled(run, prediction):
    torch._dynamo.reset()
    compiled = torch.compile(Eager(prediction))
    run("torch.compile", lambda x, m, t: compiled(x, m, t)[0])
