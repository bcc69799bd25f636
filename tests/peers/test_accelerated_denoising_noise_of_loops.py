"""denoising-diffusion-pytorch's accelerated objects with noise="philox": no two loops share noise."""

import pytest
import torch
from support.accelerated_denoising import peer
from support.accelerated_tutorial import record_bars
from support.noise_of_loops import repeats, unrelated
from torch import nn

from ddpm_ext import Philox
from ddpm_ext.integrations import accelerate


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    return record_bars(monkeypatch, peer)


class Pointwise(nn.Module):
    """A model without a mean of its own, so that samples have no more in common than their noise."""

    def __init__(self):
        super().__init__()
        self.channels = self.out_dim = 3
        self.self_condition = self.random_or_learned_sinusoidal_cond = False

    def forward(self, x, t, x_self_cond=None):
        return 0.3 * x


SIZE = 16
SHAPE = (10, 3, SIZE, SIZE)
ZEROS = torch.zeros(SHAPE)


def made(seed, ids=0, ddim=False):
    plain = peer.GaussianDiffusion(
        Pointwise(), image_size=SIZE, timesteps=50, sampling_timesteps=20 if ddim else None, ddim_sampling_eta=1.0
    )
    return accelerate(plain, noise="philox", seed=seed, sample_ids=ids)


def by_hand(gd, batch=SHAPE[0], start=0):
    x = torch.zeros(batch, *SHAPE[1:])
    for t in reversed(range(50 - start)):
        x = gd.p_sample(x, t)[0]
    return x


LOOPS = {
    "sample": lambda gd, batch=SHAPE[0]: gd.sample(batch_size=batch),
    "p_sample_loop": lambda gd, batch=SHAPE[0]: gd.p_sample_loop((batch, *SHAPE[1:])),
    "ddim_sample": lambda gd, batch=SHAPE[0]: gd.ddim_sample((batch, *SHAPE[1:])),
    "interpolate": lambda gd, batch=SHAPE[0]: gd.interpolate(ZEROS[:batch], ZEROS[:batch], t=20),
    "by_hand": by_hand,
}
loops = pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)


@loops
def test_loops_share_no_noise(loop):
    repeats(lambda seed: made(seed, ddim=loop is LOOPS["ddim_sample"]), loop)


@loops
def test_parts_of_a_batch(loop):
    parts, whole = made(9), loop(made(9))
    assert torch.equal(torch.cat([loop(parts, 4), loop(parts, 6)]), whole)
    assert torch.equal(loop(made(9, 4), 6), whole[4:])
    parts.accelerated.rng = Philox(9, 4)
    assert torch.equal(loop(parts, 6), whole[4:])


def test_loops_of_all_kinds_in_turn():
    gd = made(9)
    found = []
    for _ in range(2):
        found += [loop(gd) for loop in LOOPS.values()]
        found += [by_hand(gd, start=30), *(gd.p_sample(ZEROS, 20)[0] for _ in range(2))]
    unrelated(found)


def test_training_between_loops():
    quiet, gd, t = made(9), made(9), torch.full((10,), 49)
    expected = [quiet.q_sample(ZEROS, t) for _ in range(2)]
    found = [gd.q_sample(ZEROS, t), gd.sample(10), gd.q_sample(ZEROS, t)]
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[1])
    unrelated(found)
