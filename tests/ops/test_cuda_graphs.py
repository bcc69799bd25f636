"""A CUDA graph that the caller captures: without an rng, each replay draws other noise, as torch.randn does there.

By a faked torch.cuda; tests/cuda/test_card_graphs.py has the same on a GPU.
"""

import pytest
import torch
from support import fake_cuda
from support.step_inputs import make_table

from ddpm_ext import GaussianDiffusion, Philox, ops, randn
from ddpm_ext.integrations.acceleration import Acceleration
from ddpm_ext.ops.noise import fresh_rng

GD = GaussianDiffusion(20)
X, T = torch.linspace(-1, 1, 30).reshape(2, 3, 5), torch.tensor([3, 19])
TABLE = make_table(20)


def model(x, t):
    return 0.5 * x


FUNCTIONS = {
    "q_sample": lambda **o: GD.q_sample(X, T, **o),
    "p_sample": lambda **o: GD.p_sample(model, X, T, **o),
    "train_losses": lambda **o: GD.train_losses(model, X, T, **o),
    "input perturbation": lambda **o: GD.train_losses(model, X, T, input_perturbation=0.1, **o),
    "step_with_options": lambda **o: ops.step_with_options(X, X, TABLE, T, history1=X, **o),
    "randn": lambda rng=None: randn((2, 3), rng),
}


@pytest.fixture
def capture(monkeypatch):
    """Captures a function that returns a tensor; the result returns what its replays write."""
    fake_cuda.install(monkeypatch)

    def captured(function):
        function()  # tables and handles are made before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()

        def replay():
            graph.replay()
            return result.clone()

        return replay

    return captured


@pytest.mark.parametrize("name", FUNCTIONS)
def test_replays_draw_anew(capture, name):
    replay = capture(FUNCTIONS[name])
    torch.manual_seed(1)
    first, second = replay(), replay()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(replay(), first) and torch.equal(replay(), second)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_replays_with_an_rng_draw_its_noise(capture, name):
    replay = capture(lambda: FUNCTIONS[name](rng=Philox(4)))
    expected = FUNCTIONS[name](rng=Philox(4))
    assert torch.equal(replay(), expected) and torch.equal(replay(), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_draw_that_a_graph_counts(capture, name):
    """As a captured training step does."""
    draw = torch.tensor(0)

    def counted():
        draw.add_(1)
        return FUNCTIONS[name](rng=Philox(4, draw=draw))

    replay = capture(counted)
    for value in (2, 3):  # the call before the capture was the first
        assert torch.equal(replay(), FUNCTIONS[name](rng=Philox(4, draw=value))), value


def test_replays_of_an_accelerated_objects_training_noise(capture):
    settings = Acceleration.of("philox", None, 0)
    replay = capture(lambda: GD.q_sample(X, T, rng=settings.next_forward(X.device)))
    assert not torch.equal(replay(), replay())


def test_seeds_of_all_bits_are_drawn(capture):
    """The highest bit too, in half of them."""
    replay = capture(lambda: fresh_rng(X.device).seed)
    torch.manual_seed(0)
    seeds = torch.stack([replay() for _ in range(64)])
    assert 16 < (seeds < 0).sum() < 48 and len(seeds.unique()) == 64
