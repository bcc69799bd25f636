"""A sampling loop with each option. The model returns a given tensor, so that only the loop's own time is measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_ext import DynamicThreshold, GaussianDiffusion, Guidance, Inpaint, Philox
from ddpm_ext.demo.eager import EagerDiffusion

STEPS = 20
SCALE = 3.0
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@pytest.fixture(params=[(1, 3, 32, 32), (64, 3, 32, 32)], ids=lambda shape: "x".join(map(str, shape)))
def shape(request):
    return request.param


class Given:
    """Tensors in place of a model's outputs and a user's images."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.output, self.uncond, self.gradient = torch.randn(3, *shape).unbind()
        self.both = torch.cat([self.uncond, self.output])
        self.wide = torch.cat([self.output, torch.rand(shape)], 1)
        self.known, self.mask = torch.rand(shape), (torch.arange(shape[-1]) < shape[-1] // 2).expand(shape)


@pytest.fixture
def run(benchmark, shape):
    given = Given(shape)

    def measure(option: str, way: str, prepare: Callable[[Given], Callable[[], Any]], steps: int = STEPS) -> None:
        benchmark.group = f"a step of {option} {'x'.join(map(str, shape))}"
        benchmark.extra_info.update(way=way, elements=math.prod(shape), steps=steps)
        with torch.no_grad():
            benchmark(prepare(given))

    return measure


def ours(shape: tuple[int, ...], model: Callable[..., Tensor], **options: Any) -> Callable[[], Any]:
    gd = GaussianDiffusion(variance=options.pop("variance", "fixed_small"))
    given = {"steps": STEPS, "rng": Philox(0), "record": "last", "progress": False, **options}
    return lambda: gd.p_sample_loop(model, shape, **given)


# Each option: the model for it, and the arguments of p_sample_loop.
OPTIONS: dict[str, Callable[[Given], tuple[Callable[..., Tensor], dict[str, Any]]]] = {
    "ddpm": lambda g: (lambda x, t: g.output, {}),
    "ddim": lambda g: (lambda x, t: g.output, {"sampler": "ddim"}),
    "ddim, x0 returned": lambda g: (lambda x, t: g.output, {"sampler": "ddim", "x0": True}),
    "ddim, guidance by two functions": lambda g: (
        lambda x, t: g.output,
        {"sampler": "ddim", "guidance": Guidance(SCALE, lambda x, t: g.uncond)},
    ),
    "ddim, guidance by a doubled batch": lambda g: (lambda x, t: g.both, {"sampler": "ddim", "guidance": SCALE}),
    "ddim, guidance rescaled": lambda g: (
        lambda x, t: g.both,
        {"sampler": "ddim", "guidance": Guidance(SCALE, rescale=0.7)},
    ),
    "ddim, dynamic threshold": lambda g: (
        lambda x, t: g.output,
        {"sampler": "ddim", "clip_denoised": DynamicThreshold()},
    ),
    "dpmpp_2m": lambda g: (lambda x, t: g.output, {"sampler": "dpmpp_2m"}),
    "ddpm, learned_range": lambda g: (lambda x, t: g.wide, {"variance": "learned_range"}),
    "ddpm, cond_fn": lambda g: (lambda x, t: g.output, {"cond_fn": lambda x, t: g.gradient}),
    "ddpm, inpaint": lambda g: (lambda x, t: g.output, {"inpaint": Inpaint(g.known, g.mask)}),
    "ddpm, self_condition": lambda g: (lambda x, t, x0: g.output, {"self_condition": True}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_fused(run, shape, option):
    def prepare(given):
        model, options = OPTIONS[option](given)
        return ours(shape, model, **options)

    run(option, "ddpm_ext", prepare)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32)], ids=["1x3x32x32"])
def test_all_steps(run, shape):
    """Of 20 steps of one small sample, more than half of the time is the loop's beginning; of 1,000 it is little."""
    run("ddpm, all 1,000", "ddpm_ext", lambda given: ours(shape, lambda x, t: given.output, steps=1000), steps=1000)


def scheduler_loop(scheduler: Any, shape: tuple[int, ...], output: Callable[[], Tensor]) -> Callable[[], Any]:
    def loop() -> None:
        scheduler.set_timesteps(STEPS)
        x = torch.randn(shape)
        for t in scheduler.timesteps:
            x = scheduler.step(output(), t, x, return_dict=False)[0]

    return loop


def guided(uncond: Tensor, output: Tensor, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance as diffusers' pipelines compute it."""
    guided = uncond + SCALE * (output - uncond)
    if rescale == 0:
        return guided
    axes = list(range(1, output.dim()))
    rescaled = guided * (output.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return rescale * rescaled + (1 - rescale) * guided


# Each option: a scheduler's class, its arguments, and the model output that it gets.
PEERS: dict[str, tuple[str, dict[str, Any], Callable[[Given], Callable[[], Tensor]]]] = {
    "ddpm": ("DDPMScheduler", {}, lambda g: lambda: g.output),
    "ddim": ("DDIMScheduler", {}, lambda g: lambda: g.output),
    "ddim, guidance by two functions": ("DDIMScheduler", {}, lambda g: lambda: guided(g.uncond, g.output)),
    "ddim, guidance by a doubled batch": ("DDIMScheduler", {}, lambda g: lambda: guided(*g.both.chunk(2))),
    "ddim, guidance rescaled": ("DDIMScheduler", {}, lambda g: lambda: guided(*g.both.chunk(2), rescale=0.7)),
    "ddim, dynamic threshold": ("DDIMScheduler", {"thresholding": True}, lambda g: lambda: g.output),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}, lambda g: lambda: g.output),
    "ddpm, learned_range": ("DDPMScheduler", {"variance_type": "learned_range"}, lambda g: lambda: g.wide),
}


@pytest.mark.parametrize("option", PEERS)
def test_diffusers(run, shape, option):
    diffusers = pytest.importorskip("diffusers")
    kind, options, output = PEERS[option]
    scheduler = getattr(diffusers, kind)(1000, **LINEAR, **options)
    run(option, "diffusers", lambda given: scheduler_loop(scheduler, shape, output(given)))


def test_eager(run, shape):
    eager = EagerDiffusion()
    steps = torch.linspace(999, 0, STEPS).long().tolist()

    def prepare(given):
        def loop() -> None:
            x = torch.randn(shape)
            for t in steps:
                x = eager.p_sample(given.output, x, torch.full(shape[:1], t))

        return loop

    run("ddpm", "eager", prepare)


# Each option: the variance of guided-diffusion's object, the name of its loop, and the model output that it gets.
GUIDED: dict[str, tuple[str, str, Callable[[Given], Tensor]]] = {
    "ddpm": ("FIXED_SMALL", "p_sample_loop", lambda g: g.output),
    "ddim": ("FIXED_SMALL", "ddim_sample_loop", lambda g: g.output),
    "ddpm, learned_range": ("LEARNED_RANGE", "p_sample_loop", lambda g: g.wide),
    "ddpm, cond_fn": ("FIXED_SMALL", "p_sample_loop", lambda g: g.output),
}


@pytest.mark.parametrize("option", GUIDED)
def test_guided_diffusion(run, shape, option):
    """Needs a checkout of guided-diffusion on PYTHONPATH."""
    peer = pytest.importorskip("guided_diffusion.gaussian_diffusion")
    respace = pytest.importorskip("guided_diffusion.respace")
    variance, loop, output = GUIDED[option]
    diffusion = respace.SpacedDiffusion(
        use_timesteps=respace.space_timesteps(1000, [STEPS]),
        betas=peer.get_named_beta_schedule("linear", 1000),
        model_mean_type=peer.ModelMeanType.EPSILON,
        model_var_type=peer.ModelVarType[variance],
        loss_type=peer.LossType.MSE,
    )

    def prepare(given):
        model_output = output(given)
        more = {"cond_fn": lambda x, t: given.gradient, "model_kwargs": {}} if "cond_fn" in option else {}
        return lambda: getattr(diffusion, loop)(lambda x, t: model_output, shape, device="cpu", **more)

    run(option, "guided-diffusion", prepare)
