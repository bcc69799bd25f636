"""Steps and whole loops captured in a CUDA graph: replayed with another seed, they give the bits of the eager ones.

The seed is a tensor on the GPU, read by the kernel; so one graph serves every seed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.bits import different, halved
from benchmarks.gpu.context import Check, Context
from benchmarks.gpu.timing import capture
from ddpm_ext import GaussianDiffusion, Philox

__all__ = ["CHECKS", "measure"]

SHAPE = (4, 3, 32, 32)
STEPS = 50
SEEDS = (5, 2**63 + 7)


@functools.cache
def diffusion() -> GaussianDiffusion:
    return GaussianDiffusion(1000)


def forward(rng: Philox, device: torch.device) -> Tensor:
    x = torch.linspace(-1, 1, 4 * 3 * 32 * 32, device=device).reshape(SHAPE)
    return diffusion().q_sample(x, 500, rng=rng)


def steps(rng: Philox, device: torch.device) -> Tensor:
    """The last steps of the reverse process, one after another, in place."""
    x = torch.linspace(-1, 1, 4 * 3 * 32 * 32, device=device).reshape(SHAPE)
    for t in range(STEPS - 1, -1, -1):
        diffusion().p_sample(halved, x, t, rng=rng, out=x)
    return x


def loop(rng: Philox, device: torch.device, sampler: str = "ddpm", eta: float = 0.0) -> Tensor:
    result = diffusion().p_sample_loop(
        halved,
        SHAPE,
        sampler=sampler,
        steps=STEPS,
        eta=eta,
        rng=rng,
        record="last",
        progress=False,
        device=device,
    )
    assert isinstance(result, Tensor)
    return result


def check(function: Callable[[Philox, torch.device], Tensor], device: torch.device) -> tuple[bool, str]:
    seed = torch.tensor(1, device=device)
    results = []

    def run() -> None:
        results[:] = [function(Philox(seed), device)]

    try:
        replay = capture(run, device)
    except RuntimeError as error:
        first: BaseException = error  # what broke the capture, before the end of the capture complained in turn
        while first.__context__ is not None:
            first = first.__context__
        return False, f"can't be captured: {str(first).strip().splitlines()[0]}"
    wrong = []
    for value in SEEDS:
        if device.type == "cuda":
            results[0].fill_(float("nan"))  # what a replay doesn't write shows
        seed.fill_(value - 2**64 if value >= 2**63 else value)
        replay()
        for name, where in (("eager", device), ("the CPU's", torch.device("cpu"))):
            if differing := different(results[0], function(Philox(value), where).cpu()):
                wrong.append(f"seed {value}: {differing} elements differ from {name}")
    return not wrong, wrong[0] if wrong else f"the eager and the CPU's bits with {len(SEEDS)} other seeds"


def training(rng: Philox, device: torch.device) -> Tensor:
    """The gradient of a loss by the model's output."""
    x = torch.linspace(-1, 1, 4 * 3 * 32 * 32, device=device).reshape(SHAPE)
    output = x.flip(0).requires_grad_()
    loss = diffusion().train_losses(lambda *_: output, x, 500, rng=rng)
    return torch.autograd.grad(loss, output)[0]


FUNCTIONS: dict[str, Callable[[Philox, torch.device], Tensor]] = {
    "q_sample": forward,
    "train_losses": training,
    f"{STEPS} steps of p_sample": steps,
    "p_sample_loop, ddpm": loop,
    "p_sample_loop, ddim": functools.partial(loop, sampler="ddim", eta=0.5),
}


def make(name: str) -> Callable[[torch.device], Check]:
    return lambda device: Check(f"graph: {name}", *check(FUNCTIONS[name], device))


CHECKS: dict[str, Callable[[torch.device], Check]] = {name: make(name) for name in FUNCTIONS}


def measure(context: Context) -> None:
    for found in CHECKS.values():
        context.check(found(context.device))
