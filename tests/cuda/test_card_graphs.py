"""Steps, losses and whole loops in a CUDA graph: replayed with another seed, they compute the bits of eager calls.

The seed is a tensor on the GPU which the kernels read, so one graph serves every seed. Without a seed, each replay
draws one by torch's generator on the GPU. On the CPU the function itself stands in for its graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddpm_ext import GaussianDiffusion, Philox

SHAPE, STEPS = (4, 3, 32, 32), 50
SEEDS = (5, 2**63 + 7)
GD = GaussianDiffusion(1000)
Function = Callable[[Philox | None, torch.device], Tensor]


def samples(device: torch.device) -> Tensor:
    return torch.linspace(-1, 1, 4 * 3 * 32 * 32, device=device).reshape(SHAPE)


def halve(x: Tensor, t: Tensor) -> Tensor:
    return x * 0.5


def q_sample(rng: Philox | None, device: torch.device) -> Tensor:
    return GD.q_sample(samples(device), 500, rng=rng)


def train_losses(rng: Philox | None, device: torch.device) -> Tensor:
    """The loss's gradient with respect to the model's output."""
    output = samples(device).flip(0).requires_grad_()
    return torch.autograd.grad(GD.train_losses(lambda *_: output, samples(device), 500, rng=rng), output)[0]


def p_sample(rng: Philox | None, device: torch.device) -> Tensor:
    """The last steps of the reverse process, one after another, in place."""
    x = samples(device)
    for t in range(STEPS - 1, -1, -1):
        GD.p_sample(halve, x, t, rng=rng, out=x)
    return x


def loop(rng: Philox | None, device: torch.device, sampler: str, eta: float) -> Tensor:
    options = {"record": "last", "progress": False, "device": device}
    return GD.p_sample_loop(halve, SHAPE, sampler=sampler, steps=STEPS, eta=eta, rng=rng, **options)


FUNCTIONS: dict[str, Function] = {
    "q_sample": q_sample,
    "train_losses": train_losses,
    "p_sample": p_sample,
    "ddpm loop": functools.partial(loop, sampler="ddpm", eta=0.0),
    "ddim loop": functools.partial(loop, sampler="ddim", eta=0.5),
}


def capture(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """What replays the function from a CUDA graph; on the CPU the function itself."""
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # tables and handles are made before the capture
        function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    current = torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph):
            function()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails may leave its own stream behind
    return graph.replay


def check_replays(function: Function, device: torch.device) -> None:
    seed = torch.tensor(1, device=device)
    results: list[Tensor] = []

    def run() -> None:
        results[:] = [function(Philox(seed), device)]

    replay = capture(run, device)
    for value in SEEDS:
        for result in results:  # on a GPU, those of the capture
            result.fill_(float("nan"))  # shows what a replay does not write
        seed.fill_(value - 2**64 if value >= 2**63 else value)
        replay()
        assert torch.equal(results[0], function(Philox(value), device)), f"seed {value}: not the eager bits"
        assert torch.equal(results[0].cpu(), function(Philox(value), torch.device("cpu"))), (
            f"seed {value}: not the CPU's bits"
        )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_replay_with_another_seed(device, name):
    check_replays(FUNCTIONS[name], device)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_replays_without_a_seed_draw_anew(device, name):
    results: list[Tensor] = []

    def run() -> None:
        results[:] = [FUNCTIONS[name](None, device)]

    replay = capture(run, device)
    drawn = []
    for seed in (1, None, 1):
        if seed is not None:
            torch.manual_seed(seed)
        replay()
        drawn.append(results[0].clone())
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


@pytest.mark.cuda
def test_a_capture_that_fails_leaves_torch_as_it_was(device):
    """Its memory is freed, its generator draws, and another capture succeeds."""

    def reads(x: Tensor, t: Tensor) -> Tensor:
        return x * 0.5 if float(x.sum()) < 1e9 else x

    options = {"steps": 5, "rng": Philox(1), "record": "last", "progress": False, "device": device}
    expected = GD.p_sample_loop(reads, SHAPE, **options)
    with pytest.warns(UserWarning, match="not captured"):
        assert torch.equal(GD.p_sample_loop(reads, SHAPE, graph="step", **options), expected)
    assert torch.randn(8, device=device).isfinite().all()
    kept = torch.cuda.memory_allocated(device)
    scratch = torch.empty(2**20, device=device)
    del scratch
    assert torch.cuda.memory_allocated(device) == kept
    assert torch.equal(GD.p_sample_loop(halve, SHAPE, graph="step", **options), expected)


@pytest.mark.parametrize("name", ["q_sample", "train_losses", "p_sample"])
def test_a_draw_that_a_graph_counts(device, name):
    draw = torch.zeros((), dtype=torch.int64, device=device)
    results: list[Tensor] = []

    def run() -> None:
        draw.add_(1)
        results[:] = [FUNCTIONS[name](Philox(4, draw=draw), device)]

    replay = capture(run, device)
    for _ in range(2):
        replay()
        assert torch.equal(results[0], FUNCTIONS[name](Philox(4, draw=int(draw)), device))


def test_a_seed_that_stays_is_noticed(device):
    stays = Philox(1)
    with pytest.raises(AssertionError, match="not the eager bits"):
        check_replays(lambda rng, device: q_sample(stays if rng and rng.seed is not None else rng, device), device)
