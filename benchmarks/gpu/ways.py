"""What is timed: the operations of ddpm_ext, and how others do the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_ext import GaussianDiffusion, Philox, ops, randn
from ddpm_ext.demo.eager import EagerDiffusion

Shape = tuple[int, ...]
T = 500  # a step that draws noise
GD, RNG = GaussianDiffusion(1000), Philox(0)


class Batch(NamedTuple):
    """A step's tensors (batch, ...), and t (batch,)."""

    x: Tensor
    m: Tensor
    noise: Tensor
    out: Tensor
    t: Tensor


# The tensors that an operation must read and write.
MOVED = {
    "p_sample": ("x", "m", "out"),
    "p_sample, noise given": ("x", "m", "noise", "out"),
    "q_sample": ("x", "out"),
    "q_sample, noise given": ("x", "noise", "out"),
    "randn": ("out",),
    "extended_step": ("x", "m", "out"),
    "extended_step, learned variance": ("x", "m", "noise", "out"),
    "loss and slope": ("x", "m", "m"),
    "train_losses": ("x", "m", "m"),
}


class Way(NamedTuple):
    """`captured`: whether a CUDA graph can hold it, so that the device's own time is measured."""

    operation: str
    way: str
    call: Callable[[Batch], Any]
    captured: bool = True


# Rows of the tables: of a step with noise, and of the loss of a predicted v.
STEP_ROW = (1.1, -0.5, 0.2, 0.8, 0.0, 0.1, 0.0, 0.0, -1.0, 0.5, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0)
LOSS_ROW = (-0.6, 0.8, 1.0, 0.0)


@functools.cache
def table(row: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(row, device=device).repeat(1000, 1)


def p_sample(b: Batch, **options: Any) -> Tensor:
    return GD.p_sample(lambda *_: b.m, b.x, b.t, **options)


def extended_step(b: Batch, **options: Any) -> Tensor:
    return ops.extended_step(b.x, b.m, table(STEP_ROW, b.x.device), b.t, rng=RNG, out=b.out, **options)


def loss_and_slope(b: Batch) -> Tensor:
    """Without the backward pass, which multiplies the slope."""
    with torch.enable_grad():
        leaf = b.m.detach().requires_grad_()
        return ops.diffusion_loss(leaf, b.x, table(LOSS_ROW, b.x.device), b.t, rng=RNG)


def trained(loss: Callable[[Tensor, Batch], Tensor]) -> Callable[[Batch], Tensor]:
    """A loss of a model's output, and its gradient there."""

    def call(b: Batch) -> Tensor:
        with torch.enable_grad():
            leaf = b.m.detach().requires_grad_()
            return torch.autograd.grad(loss(leaf, b), leaf)[0]

    return call


STEPS = (
    Way("p_sample", "ddpm_ext, out=", lambda b: p_sample(b, rng=RNG, out=b.out)),
    Way("p_sample", "ddpm_ext", lambda b: p_sample(b, rng=RNG)),
    Way("p_sample", "torch.add of the same bytes", lambda b: torch.add(b.x, b.m, out=b.out)),
)
REST = (
    Way("p_sample, noise given", "ddpm_ext, out=", lambda b: p_sample(b, noise=b.noise, out=b.out)),
    Way("q_sample", "ddpm_ext, out=", lambda b: GD.q_sample(b.x, b.t, rng=RNG, out=b.out)),
    Way("q_sample, noise given", "ddpm_ext, out=", lambda b: GD.q_sample(b.x, b.t, noise=b.noise, out=b.out)),
    Way("randn", "ddpm_ext", lambda b: randn(b.x.shape, RNG, device=b.x.device, dtype=b.x.dtype)),
    Way("extended_step", "ddpm_ext, out=", extended_step),
    Way("extended_step, learned variance", "ddpm_ext, out=", lambda b: extended_step(b, model_variance=b.noise)),
    Way("loss and slope", "ddpm_ext", loss_and_slope),
)
TRAINING = Way(
    *("train_losses", "ddpm_ext", trained(lambda m, b: GD.train_losses(lambda *_: m, b.x, b.t, rng=RNG))),
    captured=False,
)


@functools.cache
def near_eager(device: torch.device) -> EagerDiffusion:
    """Eager code with its tables on the device, so that no step copies them there."""
    eager = EagerDiffusion()
    for name, numbers in vars(eager).items():
        setattr(eager, name, numbers.to(device))
    return eager


def eager_loss(eager: EagerDiffusion, m: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Of a model's output m for x_t. It returns x_t too, so that a compiler cannot leave it out."""
    noise = torch.randn_like(x)
    signal = eager.extract(eager.sqrt_alphas_cumprod, t, x)
    x_t = signal * x + eager.extract(eager.sqrt_one_minus_alphas_cumprod, t, x) * noise
    return F.mse_loss(m, noise), x_t


def others(device: torch.device) -> Iterator[Way]:
    for eager, way in ((near_eager(device), "eager, tables on the device"), (EagerDiffusion(), "eager")):
        near = way != "eager"
        yield Way("p_sample", way, lambda b, e=eager: e.p_sample(b.m, b.x, b.t), near)
        yield Way("q_sample", way, lambda b, e=eager: e.q_sample(b.x, b.t), near)
        yield Way("train_losses", way, trained(lambda m, b, e=eager: eager_loss(e, m, b.x, b.t)[0]), False)
    yield Way("randn", "torch.randn", lambda b: torch.randn(b.x.shape, device=device, dtype=b.x.dtype))


def compiled(device: torch.device, compiler: str) -> Iterator[Way]:
    """Compiled anew for each shape: call it once a shape."""
    near, way = near_eager(device), "torch.compile of eager"
    torch.compiler.reset()
    how: dict[str, Any] = {"backend": compiler, "dynamic": False}
    step, forward = torch.compile(near.p_sample, **how), torch.compile(near.q_sample, **how)
    loss = torch.compile(functools.partial(eager_loss, near), **how)
    yield Way("p_sample", way, lambda b: step(b.m, b.x, b.t))
    yield Way("q_sample", way, lambda b: forward(b.x, b.t))
    yield Way("train_losses", way, trained(lambda m, b: loss(m, b.x, b.t)[0]), False)
