"""What is timed: the operations of ddpm_ext, and how others do the same."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.names import ADD, COMPILED, DIFFUSERS, NEAR, OURS
from ddpm_ext import GaussianDiffusion, Philox, ops, randn
from ddpm_ext.demo.eager import EagerDiffusion
from ddpm_ext.ops.row import ROW, WIDTH
from ddpm_ext.tables.samplers import SAMPLERS
from ddpm_ext.tables.spacing import spaced_grid

Shape = tuple[int, ...]
T = 500  # a step that draws noise
GD, RNG = GaussianDiffusion(1000), Philox(0)


class Batch(NamedTuple):
    """A step's tensors (batch, ...), and t (batch,)."""

    x: Tensor
    m: Tensor
    u: Tensor
    noise: Tensor
    history1: Tensor
    history2: Tensor
    history3: Tensor
    out: Tensor
    kept: Tensor
    t: Tensor


OF_MODEL = ("m", "u")  # the tensors with the dtype of the model's output

# The tensors that an operation must read and write.
MOVED = {
    "p_sample": ("x", "m", "out"),
    "p_sample, noise given": ("x", "m", "noise", "out"),
    "q_sample": ("x", "out"),
    "q_sample, noise given": ("x", "noise", "out"),
    "randn": ("out",),
    "step_with_options": ("x", "m", "out"),
    "step_with_options, learned variance": ("x", "m", "noise", "out"),
    "step_with_options, guidance": ("x", "m", "u", "out"),
    "step_with_options, x0 and history": ("x", "m", "history1", "out", "kept"),
    "step_with_options, guidance and history": ("x", "m", "u", "history1", "out", "kept"),
    "x_start_scale": ("x", "m"),
    "output_scale": ("m", "u"),
    "loss and slope": ("x", "m", "m"),
    "train_losses": ("x", "m", "m"),
}


class Way(NamedTuple):
    """`captured`: whether a CUDA graph can hold it, so that the device's own time is measured. `channels_last`: the
    tensors of a Batch that are so; the others are contiguous."""

    operation: str
    way: str
    call: Callable[[Batch], Any]
    captured: bool = True
    channels_last: Sequence[str] = ()


# Of a step with noise, and with history, guidance, a learned variance and a known part where they are given.
STEP_NUMBERS = {
    **{"a": 1.1, "b": -0.5, "c0": 0.2, "c1": 0.8, "s": 0.1, "w": 7.5},
    **{"h1": 0.3, "l0": -1.0, "l1": 0.5, "signal_after": 1.0},
}
STEP_ROW = tuple(STEP_NUMBERS.get(name, 0.0) for name in ROW) + (0.0,) * (WIDTH - len(ROW))
LOSS_ROW = (-0.6, 0.8, 1.0, 0.0)  # of the loss of a predicted v


@functools.cache
def table(row: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(row, device=device).repeat(1000, 1)


def p_sample(b: Batch, **options: Any) -> Tensor:
    return GD.p_sample(lambda *_: b.m, b.x, b.t, **options)


def step_with_options(b: Batch, row: tuple[float, ...] = STEP_ROW, **options: Any) -> Tensor:
    return ops.step_with_options(b.x, b.m, table(row, b.x.device), b.t, rng=RNG, out=b.out, **options)


def x_start_scale(b: Batch) -> Tensor:
    return ops.x_start_scale(b.x, b.m, table(STEP_ROW, b.x.device), b.t, quantile=0.995)


def ways_with_history() -> Iterator[Way]:
    """A step in the middle of a loop, of one sampler for each set of tensors that steps with history read and write."""
    seen = set()
    for name in ("unipc", *SAMPLERS):
        columns = SAMPLERS[name](spaced_grid(GD.alphas_cumprod, GD.betas, 20, "linspace"))
        middle = len(columns) // 2
        reads = [f"history{i}" for i in (1, 2, 3) if getattr(columns, f"h{i}")[middle] != 0]
        kind = len(reads), bool(columns.s[middle] != 0)
        if reads and kind not in seen:
            seen.add(kind)
            MOVED[f"step_with_options, {name}"] = ("x", "m", *reads, "out", "kept")
            row = tuple(columns.packed("cpu")[middle].tolist())

            def call(b: Batch, row: tuple[float, ...] = row, reads: Sequence[str] = reads) -> Tensor:
                history = {each: getattr(b, each) for each in reads}
                return step_with_options(b, row, **history, history_out=b.kept)

            yield Way(f"step_with_options, {name}", "ddpm_ext, out=", call)


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
    Way("p_sample", OURS, lambda b: p_sample(b, rng=RNG, out=b.out)),
    Way("p_sample", "ddpm_ext", lambda b: p_sample(b, rng=RNG)),
    Way("p_sample", ADD, lambda b: torch.add(b.x, b.m, out=b.out)),
)
# As behind a U-Net in channels_last: its output alone, and all tensors of a loop that begins with such a sample.
CHANNELS_LAST = (
    Way("p_sample", "ddpm_ext, out=, model's output channels_last", STEPS[0].call, channels_last=("m",)),
    Way("p_sample", "ddpm_ext, out=, all channels_last", STEPS[0].call, channels_last=("x", "m", "out")),
    Way(
        *("step_with_options, guidance", "ddpm_ext, out=, all channels_last"),
        lambda b: step_with_options(b, uncond_output=b.u),
        channels_last=("x", "m", "u", "out"),
    ),
)
WITH_HISTORY = tuple(ways_with_history())
# That have kernels of their own.
WITH_OPTIONS = tuple(f"step_with_options, {name}" for name in ("guidance", "x0 and history", "guidance and history"))
# The most valuable first.
REST = (
    Way("step_with_options, guidance", "ddpm_ext, out=", lambda b: step_with_options(b, uncond_output=b.u)),
    Way(
        *("step_with_options, x0 and history", "ddpm_ext, out="),
        lambda b: step_with_options(b, history1=b.history1, x0_out=b.kept),
    ),
    Way(
        *("step_with_options, guidance and history", "ddpm_ext, out="),
        lambda b: step_with_options(b, uncond_output=b.u, history1=b.history1, history_out=b.kept),
    ),
    Way("loss and slope", "ddpm_ext", loss_and_slope),
    Way("q_sample", "ddpm_ext, out=", lambda b: GD.q_sample(b.x, b.t, rng=RNG, out=b.out)),
    Way("x_start_scale", "ddpm_ext", x_start_scale),
    Way("output_scale", "ddpm_ext", lambda b: ops.output_scale(b.m, b.u, guidance=3.0, rescale=0.7)),
    Way(
        "step_with_options, learned variance", "ddpm_ext, out=", lambda b: step_with_options(b, model_variance=b.noise)
    ),
    Way("q_sample, noise given", "ddpm_ext, out=", lambda b: GD.q_sample(b.x, b.t, noise=b.noise, out=b.out)),
    Way("p_sample, noise given", "ddpm_ext, out=", lambda b: p_sample(b, noise=b.noise, out=b.out)),
    Way("randn", "ddpm_ext", lambda b: randn(b.x.shape, RNG, device=b.x.device, dtype=b.x.dtype)),
    Way("step_with_options", "ddpm_ext, out=", step_with_options),
)
TRAINING = Way(
    *("train_losses", "ddpm_ext", trained(lambda m, b: GD.train_losses(lambda *_: m, b.x, b.t, rng=RNG))),
    captured=False,
)


EAGER = EagerDiffusion()


@functools.cache
def near_eager(device: torch.device) -> EagerDiffusion:
    """Eager code with its tables on the device, so that no step copies them there."""
    eager = EagerDiffusion()
    for name, numbers in vars(eager).items():
        setattr(eager, name, numbers.to(device))
    return eager


def far_eager(_: torch.device) -> EagerDiffusion:
    return EAGER


@functools.cache
def diffusers_scheduler(device: torch.device) -> Any:
    """With its timesteps on the device, as a pipeline has them."""
    scheduler = importlib.import_module("diffusers").DDPMScheduler(1000)
    scheduler.set_timesteps(1000, device=device)
    return scheduler


def diffusers_step(b: Batch) -> Tensor:
    scheduler = diffusers_scheduler(b.x.device)
    return scheduler.step(b.m, scheduler.timesteps[999 - T], b.x).prev_sample


def eager_loss(eager: EagerDiffusion, m: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Of a model's output m for x_t. It returns x_t too, so that a compiler cannot leave it out."""
    noise = torch.randn_like(x)
    signal = eager.extract(eager.sqrt_alphas_cumprod, t, x)
    x_t = signal * x + eager.extract(eager.sqrt_one_minus_alphas_cumprod, t, x) * noise
    return F.mse_loss(m, noise), x_t


def others() -> Iterator[Way]:
    """Nothing of theirs is on a device before they are called."""
    for eager, way in ((near_eager, NEAR), (far_eager, "eager")):
        yield Way("p_sample", way, lambda b, e=eager: e(b.x.device).p_sample(b.m, b.x, b.t), way == NEAR)
        yield Way("q_sample", way, lambda b, e=eager: e(b.x.device).q_sample(b.x, b.t), way == NEAR)
        loss = trained(lambda m, b, e=eager: eager_loss(e(b.x.device), m, b.x, b.t)[0])
        yield Way("train_losses", way, loss, False)
    if importlib.util.find_spec("diffusers"):
        yield Way("p_sample", DIFFUSERS, diffusers_step, captured=False)  # it reads values back
    yield Way("randn", "torch.randn", lambda b: torch.randn(b.x.shape, device=b.x.device, dtype=b.x.dtype))


@functools.cache
def compiled_eager(name: str, device: torch.device, compiler: str) -> Callable[..., Any]:
    near = near_eager(device)
    functions = {"p_sample": near.p_sample, "q_sample": near.q_sample, "loss": functools.partial(eager_loss, near)}
    return torch.compile(functions[name], backend=compiler, dynamic=False)


def compiled(compiler: str) -> Iterator[Way]:
    """Compiled when they are called, anew for each shape."""

    def function(name: str, b: Batch) -> Callable[..., Any]:
        return compiled_eager(name, b.x.device, compiler)

    yield Way("p_sample", COMPILED, lambda b: function("p_sample", b)(b.m, b.x, b.t))
    yield Way("q_sample", COMPILED, lambda b: function("q_sample", b)(b.x, b.t))
    yield Way("train_losses", COMPILED, trained(lambda m, b: function("loss", b)(m, b.x, b.t)[0]), False)
