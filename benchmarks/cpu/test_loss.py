"""A step of training without the model: x_t, the loss of a given model output, and the gradient with respect to it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_ext import GaussianDiffusion, Philox


@pytest.fixture(params=[(64, 3, 32, 32), (16, 3, 256, 256)], ids=lambda shape: "x".join(map(str, shape)))
def shape(request):
    return request.param


@pytest.fixture(params=["eps", "x0", "v"])
def prediction(request):
    return request.param


@pytest.fixture
def run(benchmark, shape):
    def measure(what, way, loss, halves=1):
        x_start, t = torch.randn(shape), torch.randint(1000, shape[:1])
        wide = (shape[0], halves * shape[1], *shape[2:])
        model_output = torch.randn(wide, requires_grad=True)
        benchmark.group = f"train_losses {what} {'x'.join(map(str, shape))}"
        benchmark.extra_info.update(way=way, elements=math.prod(shape))

        def step():
            model_output.grad = None
            loss(x_start, model_output, t).backward()

        benchmark(step)

    return measure


class Eager:
    """The loss as tutorials write it. It also returns x_t, so that a compiler cannot leave it out."""

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
    run(prediction, "ddpm_ext", lambda x, m, t: gd.train_losses(lambda *_: m, x, t, rng=rng))


def test_eager(run, prediction):
    eager = Eager(prediction)
    run(prediction, "eager", lambda x, m, t: eager(x, m, t)[0])


def test_compiled(run, prediction):
    torch._dynamo.reset()
    compiled = torch.compile(Eager(prediction))
    run(prediction, "torch.compile", lambda x, m, t: compiled(x, m, t)[0])


def guided_diffusion(mean, variance, loss):
    """The loss of guided-diffusion, which needs a checkout of it on PYTHONPATH."""
    peer = pytest.importorskip("guided_diffusion.gaussian_diffusion")
    diffusion = peer.GaussianDiffusion(
        betas=peer.get_named_beta_schedule("linear", 1000),
        model_mean_type=peer.ModelMeanType[mean],
        model_var_type=peer.ModelVarType[variance],
        loss_type=peer.LossType[loss],
    )
    return lambda x, m, t: diffusion.training_losses(lambda *_: m, x, t)["loss"].mean()


@pytest.mark.parametrize(("what", "mean"), [("eps", "EPSILON"), ("x0", "START_X")])
def test_guided_diffusion(run, what, mean):
    run(what, "guided-diffusion", guided_diffusion(mean, "FIXED_SMALL", "MSE"))


# The variational bound, alone or beside the error: the names of the loss here and in guided-diffusion.
BOUNDS = {"eps, learned range": ("mse", "RESCALED_MSE"), "eps, learned range, bound": ("vlb", "KL")}


@pytest.mark.parametrize("what", BOUNDS)
def test_fused_with_bound(run, what):
    gd, rng = GaussianDiffusion(variance="learned_range"), Philox(0)
    loss = BOUNDS[what][0]
    run(what, "ddpm_ext", lambda x, m, t: gd.train_losses(lambda *_: m, x, t, rng=rng, loss=loss), halves=2)


@pytest.mark.parametrize("what", BOUNDS)
def test_guided_diffusion_with_bound(run, what):
    run(what, "guided-diffusion", guided_diffusion("EPSILON", "LEARNED_RANGE", BOUNDS[what][1]), halves=2)


class Given(nn.Module):
    """A model with the attributes that denoising-diffusion-pytorch reads. It returns the output that is set."""

    channels = out_dim = 3
    self_condition = False

    def __init__(self) -> None:
        super().__init__()
        self.output: Tensor | None = None

    def forward(self, *_: object) -> Tensor | None:
        return self.output


def test_lucidrains(run, shape, prediction):
    """The loss of denoising-diffusion-pytorch, if it is installed."""
    peer = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
    model, objective = Given(), {"eps": "pred_noise", "x0": "pred_x0", "v": "pred_v"}[prediction]
    diffusion = peer.GaussianDiffusion(model, image_size=shape[2:], objective=objective, auto_normalize=False)

    def loss(x_start, model_output, t):
        model.output = model_output
        return diffusion.p_losses(x_start, t)

    run(prediction, "lucidrains", loss)
