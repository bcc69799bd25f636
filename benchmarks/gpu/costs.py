"""A step is one launch, waits for nothing, and allocates nothing but its output."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.bits import LIKE_X, OF_MODEL, PER_SAMPLE
from benchmarks.gpu.context import Check, Context
from benchmarks.gpu.counters import (
    allocations,
    launches,
    profiler_works,
    sync_mode_works,
    synchronisation,
)
from ddpm_ext import GaussianDiffusion, Philox, ops, randn
from ddpm_ext.tables.samplers import ddpm
from ddpm_ext.tables.spacing import make_grid

__all__ = ["MEASURES", "STEPS", "check", "check_loop", "measure"]

SHAPE = (8, 3, 16, 16)
BYTES = 8 * 3 * 16 * 16 * 4  # a multiple of the 512 bytes to which torch rounds a block on a GPU
SMALL = 16 * 512  # of a training step's sums, a loss a sample and the like, in blocks of 512 bytes
CALLS = 10


class Inputs(NamedTuple):
    """On the device, as a sampling loop has them: no call moves anything."""

    gd: GaussianDiffusion
    x: Tensor
    m: Tensor
    out: Tensor
    t: Tensor
    seed: Tensor
    table: Tensor
    extras: dict[str, Tensor]


@functools.cache
def inputs(device: torch.device) -> Inputs:
    x = torch.linspace(-1, 1, BYTES // 4, device=device).reshape(SHAPE)
    t, seed = torch.arange(8, device=device) * 100, torch.tensor(5, device=device)
    gd, m, out, copy, x0 = GaussianDiffusion(1000), x.flip(0).contiguous(), *(torch.empty_like(x) for _ in range(3))
    grid = make_grid(gd.alphas_cumprod, torch.arange(999, -1, -1), betas=gd.betas)
    extras = dict.fromkeys((*LIKE_X, *OF_MODEL), m) | dict.fromkeys(PER_SAMPLE, x.flatten()[:8])
    return Inputs(
        gd, x, m, out, t, seed, ddpm(grid)[::-1].packed_extended(device), extras | {"out_copy": copy, "x0_out": x0}
    )


NOISES: dict[str, Callable[[Inputs], dict[str, Any]]] = {
    "drawn": lambda i: {"rng": Philox(1)},
    "drawn, seed on the device": lambda i: {"rng": Philox(i.seed)},
    "given": lambda i: {"noise": i.x},
    "torch's seed": lambda i: {},
}
OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "p_sample": lambda i, t, **o: i.gd.p_sample(lambda *_: i.m, i.x, t, **o),
    "q_sample": lambda i, t, **o: i.gd.q_sample(i.x, t, **o),
    "extended_step, all options": lambda i, t, **o: ops.extended_step(i.x, i.m, i.table, t, **i.extras, **o),
}
Step = Callable[[Inputs, "dict[str, Any]"], Tensor]


def _step(operation: str, tensor_t: bool, noise: str) -> Step:
    def step(i: Inputs, options: dict[str, Any]) -> Tensor:
        return OPERATIONS[operation](i, i.t if tensor_t else 500, **NOISES[noise](i), **options)

    return step


STEPS: dict[str, Step] = {
    f"{operation}, t {'a tensor' if tensor_t else 'an int'}, noise {noise}": _step(operation, tensor_t, noise)
    for operation in OPERATIONS
    for tensor_t in (True, False)
    for noise in NOISES
}


def check_launches(step: Step, i: Inputs, device: torch.device) -> Check:
    if why := profiler_works(device):
        return Check("launches", None, why)
    for _ in range(3):  # the profiler may lose a launch, and never makes one up
        seen = launches(lambda: step(i, {"out": i.out}), device, CALLS)
        count = sum(seen.kernels.values())
        if count >= CALLS:
            break
    ok = count == CALLS and len(seen.kernels) == 1 and not seen.slow
    others = f", CUDA's {dict(seen.slow)}" if seen.slow else ""
    kinds = "" if len(seen.kernels) == 1 else f" of {dict(seen.kernels)}"
    return Check("launches", ok, f"{count} launches in {CALLS} calls{kinds}{others}")


def check_synchronisation(step: Step, i: Inputs, device: torch.device) -> Check:
    if why := sync_mode_works(device):
        return Check("synchronisation", None, why)
    waits = [w for options in ({}, {"out": i.out}) if (w := synchronisation(lambda o=options: step(i, o), device))]
    return Check("synchronisation", not waits, waits[0] if waits else "none")


def check_allocations(step: Step, i: Inputs, device: torch.device) -> Check:
    blocks, size = allocations(lambda: step(i, {}), device)
    return Check("allocations", (blocks, size) == (1, BYTES), f"{blocks} of {size} bytes, the output has {BYTES}")


def check_out(step: Step, i: Inputs, device: torch.device) -> Check:
    blocks, size = allocations(lambda: step(i, {"out": i.out}), device)
    return Check("allocations with out=", (blocks, size) == (0, 0), f"{blocks} of {size} bytes")


MEASURES: dict[str, Callable[[Step, Inputs, torch.device], Check]] = {
    "launches": check_launches,
    "synchronisation": check_synchronisation,
    "allocations": check_allocations,
    "allocations with out=": check_out,
}


def check(measure: str, step: str, device: torch.device) -> Check:
    with torch.no_grad():
        found = MEASURES[measure](STEPS[step], inputs(device), device)
    return Check(f"{measure}: {step}", found.ok, found.found)


def check_loop(device: torch.device) -> Check:
    """Twenty steps more are twenty launches more."""
    name = "launches: p_sample_loop"
    if why := profiler_works(device):
        return Check(name, None, why)
    i = inputs(device)

    def loop(steps: int) -> Tensor:
        return i.gd.p_sample_loop(
            lambda *_: i.m, SHAPE, steps=steps, rng=Philox(1), record="last", progress=False, device=device
        )

    few, many = (launches(lambda s=steps: loop(s), device).kernels for steps in (5, 25))
    more = many - few
    ok = sum(more.values()) == 20 and len(more) == 1
    return Check(name, ok, f"{sum(few.values())} in 5 steps, {sum(many.values())} in 25")


def check_randn(device: torch.device) -> Iterator[Check]:
    def draw() -> Tensor:
        return randn(SHAPE, Philox(1), device=device)

    if why := profiler_works(device):
        yield Check("launches: randn", None, why)
    else:
        count = sum(launches(draw, device, CALLS).kernels.values())
        yield Check("launches: randn", count == CALLS, f"{count} launches in {CALLS} calls")
    blocks, size = allocations(draw, device)
    yield Check("allocations: randn", (blocks, size) == (1, BYTES), f"{blocks} of {size} bytes, the output has {BYTES}")


def train(i: Inputs, noise: str) -> Tensor:
    """The gradient of a loss by the model's output, which is there."""
    with torch.enable_grad():
        output = i.m.detach().requires_grad_()
        loss = i.gd.train_losses(lambda *_: output, i.x, i.t, **NOISES[noise](i))
        return torch.autograd.grad(loss, output)[0]


def check_training(noise: str, device: torch.device) -> Iterator[Check]:
    """x_t, and the loss with its slope, are a launch each; what else is launched is told: on a GPU the slope is
    multiplied in its place, since nobody reads whether what comes back for the loss is 1."""
    i = inputs(device)

    def step() -> Tensor:
        return train(i, noise)

    name = f"train_losses, noise {noise}"
    if why := profiler_works(device):
        yield Check(f"launches: {name}", None, why)
    else:
        seen = launches(step, device, CALLS)
        ours = {kernel: count for kernel, count in seen.kernels.items() if "ddpm_ext" in kernel}
        others = seen.kernels.total() - sum(ours.values())
        found = f"{sum(ours.values())} launches in {CALLS} calls, and {others} of torch's own, CUDA's {dict(seen.slow)}"
        yield Check(f"launches: {name}", list(ours.values()) == [CALLS] * 2 and not seen.slow, found)
    if why := sync_mode_works(device):
        yield Check(f"synchronisation: {name}", None, why)
    else:
        waits = synchronisation(step, device)
        yield Check(f"synchronisation: {name}", not waits, waits or "none")
    _, size = allocations(step, device)
    most = 2 * BYTES + SMALL
    yield Check(f"allocations: {name}", size <= most, f"{size} bytes, expected at most {most}")


def measure(context: Context) -> None:
    for name in MEASURES:
        for step in STEPS:
            context.check(check(name, step, context.device))
    context.check(check_loop(context.device))
    for found in check_randn(context.device):
        context.check(found)
    for noise in NOISES:
        for found in check_training(noise, context.device):
            context.check(found)
