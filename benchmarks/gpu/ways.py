"""What is timed: our steps over sets of inputs, a copy of the bytes that a step moves, and how others do the step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.losses import loss_and_slope
from ddpm_ext import GaussianDiffusion, Philox, ops, randn
from ddpm_ext.demo.eager import EagerDiffusion
from ddpm_ext.tables.samplers import ddpm
from ddpm_ext.tables.spacing import make_grid

__all__ = ["OPERATIONS", "Batch", "batches", "compiled", "copies", "gradient", "others"]

T = 500  # a step that draws noise


class Batch(NamedTuple):
    """A step's tensors (batch, ...), and t (batch,)."""

    x: Tensor
    m: Tensor
    noise: Tensor
    out: Tensor
    t: Tensor


class Operation(NamedTuple):
    """`reads`: of x, m and noise, which it reads; it writes out, or makes its own (`keeps`), as large as `writes`."""

    reads: tuple[str, ...]
    call: Callable[[GaussianDiffusion, Batch, Philox], Any]
    keeps: bool = False
    writes: str = "x"

    def moved(self, numel: int, dtype: torch.dtype, second: torch.dtype) -> int:
        """Bytes that must be moved for samples of `dtype` and a model's output of `second`."""
        sizes = {"x": dtype.itemsize, "m": second.itemsize, "noise": dtype.itemsize}
        return numel * (sum(sizes[name] for name in self.reads) + sizes[self.writes])


@functools.cache
def extended_table(device: torch.device) -> Tensor:
    gd = GaussianDiffusion(1000)
    grid = make_grid(gd.alphas_cumprod, torch.arange(999, -1, -1), betas=gd.betas)
    return ddpm(grid, variance="learned_range")[::-1].packed_extended(device)


@functools.cache
def loss_table(device: torch.device) -> Tensor:
    """Rows of which x_start and noise count."""
    return torch.tensor([-0.6, 0.8, 1.0, 0.0], device=device).repeat(1000, 1)


OPERATIONS = {
    "p_sample": Operation(("x", "m"), lambda gd, b, rng: gd.p_sample(lambda *_: b.m, b.x, b.t, rng=rng, out=b.out)),
    "p_sample, noise given": Operation(
        ("x", "m", "noise"), lambda gd, b, rng: gd.p_sample(lambda *_: b.m, b.x, b.t, noise=b.noise, out=b.out)
    ),
    "q_sample": Operation(("x",), lambda gd, b, rng: gd.q_sample(b.x, b.t, rng=rng, out=b.out)),
    "q_sample, noise given": Operation(
        ("x", "noise"), lambda gd, b, rng: gd.q_sample(b.x, b.t, noise=b.noise, out=b.out)
    ),
    "randn": Operation((), lambda gd, b, rng: randn(b.x.shape, rng, device=b.x.device, dtype=b.x.dtype), keeps=True),
    "extended_step": Operation(
        ("x", "m"),
        lambda gd, b, rng: ops.extended_step(
            b.x, b.m, extended_table(b.x.device), b.t, clip=(-1.0, 1.0), rng=rng, out=b.out
        ),
    ),
    "extended_step, learned variance": Operation(
        ("x", "m", "noise"),
        lambda gd, b, rng: ops.extended_step(
            *(b.x, b.m, extended_table(b.x.device), b.t),
            **{"clip": (-1.0, 1.0), "model_variance": b.noise, "rng": rng, "out": b.out},
        ),
    ),
    "loss and slope": Operation(
        ("x", "m"),
        lambda gd, b, rng: loss_and_slope(b.m, b.x, loss_table(b.x.device), b.t, rng=rng, reduction="mean"),
        keeps=True,
        writes="m",
    ),
}


def batches(
    count: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    second: torch.dtype,
    device: torch.device,
    reads: tuple[str, ...] = ("x", "m", "noise"),
) -> list[Batch]:
    """Sets of inputs, each in memory of its own, of random values; what isn't read is one tensor for all."""

    def make(name: str, of: torch.dtype) -> Tensor:
        if name in reads:
            return torch.randn(count, *shape, device=device, dtype=of)
        return torch.zeros(shape, device=device, dtype=of).expand(count, *shape)

    x, m, noise = make("x", dtype), make("m", second), make("noise", dtype)
    out = torch.empty(count, *shape, device=device, dtype=dtype)
    t = torch.full(shape[:1], T, device=device)
    return [Batch(x[i], m[i], noise[i], out[i], t) for i in range(count)]


def copies(count: int, moved: int, device: torch.device) -> list[Callable[[], Any]]:
    """Device-to-device copies that read and write `moved` bytes together, each in memory of its own."""
    source = torch.randint(256, (count, moved // 2), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return [lambda i=i: target[i].copy_(source[i]) for i in range(count)]


def near_eager(device: torch.device) -> EagerDiffusion:
    """Eager code with its tables on the device, so that no step copies them there."""
    eager = EagerDiffusion()
    for name, table in vars(eager).items():
        setattr(eager, name, table.to(device))
    return eager


def eager_loss(eager: EagerDiffusion, m: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Of a model's output m for x_t, which is handed out, so that a compiler makes it, too."""
    noise = torch.randn_like(x)
    signal = eager.extract(eager.sqrt_alphas_cumprod, t, x)
    x_t = signal * x + eager.extract(eager.sqrt_one_minus_alphas_cumprod, t, x) * noise
    return F.mse_loss(m, noise), x_t


def gradient(loss: Callable[[Tensor], Tensor], output: Tensor) -> Callable[[], Tensor]:
    """A call that makes a loss of a model's output, and its gradient there."""
    leaf = output.detach().requires_grad_()

    def call() -> Tensor:
        with torch.enable_grad():
            return torch.autograd.grad(loss(leaf), leaf)[0]

    return call


def others(batch: Batch) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Other ways to do what ours do: operation, way, call."""
    device = batch.x.device
    eager, near = EagerDiffusion(), near_eager(device)
    x, m, t = batch.x, batch.m, batch.t
    yield "p_sample", "eager", lambda: eager.p_sample(m, x, t)
    yield "q_sample", "eager", lambda: eager.q_sample(x, t)
    yield "p_sample", "eager, tables on the device", lambda: near.p_sample(m, x, t)
    yield "q_sample", "eager, tables on the device", lambda: near.q_sample(x, t)
    yield "train_losses", "eager", gradient(lambda m: eager_loss(eager, m, x, t)[0], m)
    yield "train_losses", "eager, tables on the device", gradient(lambda m: eager_loss(near, m, x, t)[0], m)
    yield "randn", "torch.randn", lambda: torch.randn(x.shape, device=device, dtype=x.dtype)
    try:
        from diffusers import DDPMScheduler
    except (ImportError, RuntimeError):  # the latter where something that it needs is broken
        return
    scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    yield "p_sample", "diffusers", lambda: scheduler.step(m, T, x, return_dict=False)
    yield "q_sample", "diffusers", lambda: scheduler.add_noise(x, torch.randn_like(x), t)


def compiled(batch: Batch, compiler: str) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    near, way = near_eager(batch.x.device), "torch.compile of eager, tables on the device"
    torch.compiler.reset()
    step = torch.compile(near.p_sample, backend=compiler, dynamic=False)
    yield "p_sample", way, lambda: step(batch.m, batch.x, batch.t)
    forward = torch.compile(near.q_sample, backend=compiler, dynamic=False)
    yield "q_sample", way, lambda: forward(batch.x, batch.t)
    loss = torch.compile(functools.partial(eager_loss, near), backend=compiler, dynamic=False)
    yield "train_losses", way, gradient(lambda m: loss(m, batch.x, batch.t)[0], batch.m)
