"""Steps, losses and whole loops in a CUDA graph: replayed with another seed, they compute the bits of eager calls.

The seed is a tensor on the GPU which the kernels read, so one graph serves every seed. Without a seed, each replay
draws one by torch's generator on the GPU. On the CPU a faked torch.cuda records what a graph would.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from support import fake_cuda
from support.step_inputs import make_table
from torch import Tensor

from ddpm_ext import GaussianDiffusion, Philox, ops, randn
from ddpm_ext.integrations.acceleration import Acceleration
from ddpm_ext.ops.noise import fresh_rng

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


def train_losses(rng: Philox | None, device: torch.device, **options: float) -> Tensor:
    """The loss's gradient with respect to the model's output. On a CPU the loss: autograd reads values back there."""
    output = samples(device).flip(0).requires_grad_()
    loss = GD.train_losses(lambda x, t: output + x.detach(), samples(device), 500, rng=rng, **options)
    return loss.detach() if device.type == "cpu" else torch.autograd.grad(loss, output)[0]


def p_sample(rng: Philox | None, device: torch.device) -> Tensor:
    """The last steps of the reverse process, one after another, in place."""
    x = samples(device)
    for t in range(STEPS - 1, -1, -1):
        GD.p_sample(halve, x, t, rng=rng, out=x)
    return x


def loop(rng: Philox | None, device: torch.device, sampler: str, eta: float) -> Tensor:
    options = {"record": "last", "progress": False, "device": device}
    return GD.p_sample_loop(halve, SHAPE, sampler=sampler, steps=STEPS, eta=eta, rng=rng, **options)


@functools.cache
def table_on(device: torch.device) -> Tensor:
    """Made before a capture, in which memory of the host that is not pinned cannot be copied."""
    return make_table(4, s=0.5).to(device)


def step_with_options(rng: Philox | None, device: torch.device) -> Tensor:
    x, t = samples(device), torch.arange(4, device=device)
    return ops.step_with_options(x, 0.5 * x, table_on(device), t, history1=x, rng=rng)


FUNCTIONS: dict[str, Function] = {
    "q_sample": q_sample,
    "train_losses": train_losses,
    "input perturbation": functools.partial(train_losses, input_perturbation=0.1),
    "step_with_options": step_with_options,
    "randn": lambda rng, device: randn(SHAPE, rng, device=device),
    "p_sample": p_sample,
    "ddpm loop": functools.partial(loop, sampler="ddpm", eta=0.0),
    "ddim loop": functools.partial(loop, sampler="ddim", eta=0.5),
}


@pytest.fixture
def capture(device, monkeypatch):
    """Captures a function that returns a tensor; what it returns replays it, and returns what the replay wrote."""
    if device.type == "cpu":
        fake_cuda.install(monkeypatch)

    def captured(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # tables and handles are made before the capture
            function()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # A capture that fails may leave its own stream behind.
        with torch.cuda.stream(current), torch.cuda.graph(graph):
            result = function()

        def replay() -> Tensor:
            result.fill_(float("nan") if result.is_floating_point() else -1)  # shows what a replay does not write
            graph.replay()
            return result.clone()

        return replay

    return captured


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_replay_with_another_seed(device, capture, name):
    seed = torch.tensor(1, device=device)
    replay = capture(lambda: FUNCTIONS[name](Philox(seed), device))
    for value in SEEDS:
        seed.fill_(value - 2**64 if value >= 2**63 else value)
        assert torch.equal(replay(), FUNCTIONS[name](Philox(value), device)), f"seed {value}: not the eager bits"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_replays_without_a_seed_draw_anew(device, capture, name):
    replay = capture(lambda: FUNCTIONS[name](None, device))
    torch.manual_seed(1)
    first, second = replay(), replay()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(replay(), first) and torch.equal(replay(), second)


def test_replays_of_an_accelerated_objects_training_noise(device, capture):
    settings = Acceleration.of("philox", None, 0)
    replay = capture(lambda: q_sample(settings.next_forward(device), device))
    assert not torch.equal(replay(), replay())


def test_seeds_of_all_bits_are_drawn(device, capture):
    """The highest bit too, in half of them."""
    replay = capture(lambda: fresh_rng(device).seed)
    torch.manual_seed(0)
    seeds = torch.stack([replay() for _ in range(64)])
    assert 16 < (seeds < 0).sum() < 48 and len(seeds.unique()) == 64


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


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "loop" not in name])
def test_a_draw_that_a_graph_counts(device, capture, name):
    """As a captured training step does."""
    draw = torch.zeros((), dtype=torch.int64, device=device)

    def counted() -> Tensor:
        draw.add_(1)
        return FUNCTIONS[name](Philox(4, draw=draw), device)

    replay = capture(counted)
    for _ in range(2):
        assert torch.equal(replay(), FUNCTIONS[name](Philox(4, draw=int(draw)), device))
