"""What only a GPU has: streams, a second GPU, and loss functions that are compiled into CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from ddpm_ext import GaussianDiffusion, Philox

pytestmark = pytest.mark.cuda

SHAPE = (4, 3, 32, 32)


@pytest.fixture
def gd():
    return GaussianDiffusion(1000)


def test_current_stream(device, gd, normal):
    """On a stream of its own that is kept busy, a step sees what was written there before it."""
    x, m, t = normal(*SHAPE), normal(*SHAPE, seed=1), torch.full(SHAPE[:1], 500, device=device)
    expected = gd.p_sample(lambda *_: m, x, t, rng=Philox(1))
    late, out = torch.zeros_like(x), torch.empty_like(x)
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        late.copy_(x)
        gd.p_sample(lambda *_: m, late, t, rng=Philox(1), out=out)
        assert not stream.query(), "the wait was over too soon for this test to mean anything"
    stream.synchronize()
    assert torch.equal(out, expected)


def test_device_that_is_not_current(device, gd, normal):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1 - device.index)
    x, m = normal(*SHAPE), normal(*SHAPE, seed=1)
    with torch.cuda.device(other):
        here = gd.p_sample(lambda *_: m, x, 500, rng=Philox(1))
    there = gd.p_sample(lambda *_: m.to(other), x.to(other), 500, rng=Philox(1))
    assert (here.device, there.device) == (device, other)
    assert torch.equal(there.to(device), here)
    assert torch.equal(here, gd.p_sample(lambda *_: m, x, 500, rng=Philox(1)))


def test_compiled_into_cuda_graphs(fresh_compiler, device, gd, normal):
    """A loss in "reduce-overhead": torch runs it once with its memory from a graph's pool, captures it, and replays it,
    and complains of memory of the pool that nobody gave back."""
    x, m, t = normal(*SHAPE), normal(*SHAPE, seed=1), torch.arange(4, device=device) * 100

    def loss(output):
        return gd.train_losses(lambda *_: output, x, t, rng=Philox(9))

    def gradient(loss):
        output = m.clone().requires_grad_()
        return torch.autograd.grad(loss(output), output)[0]

    expected = gradient(loss)
    compiled = torch.compile(loss, mode="reduce-overhead")
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(gradient(compiled), expected)
        assert torch.equal(gradient(loss), expected)
