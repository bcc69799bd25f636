"""The schedules' betas against the formulas of their papers, computed with numpy."""

import numpy as np
import pytest
import torch
from support.choices import for_many
from support.tutorial import linear_betas

from ddpm_ext.tables.schedules import SCHEDULES, make_betas, rescale_zero_terminal_snr

LENGTHS = (20, 50, 1000)


def check_betas(betas, expected, rtol):
    assert betas.dtype == torch.float64 and betas.device.type == "cpu"
    np.testing.assert_allclose(betas.numpy(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("timesteps", LENGTHS)
def test_linear(timesteps):
    check_betas(make_betas("linear", timesteps), linear_betas(timesteps).numpy(), 2e-15)  # measured 3.2e-16, factor 6


@pytest.mark.parametrize("timesteps", LENGTHS)
def test_scaled_linear(timesteps):
    i = np.arange(timesteps) / (timesteps - 1)
    expected = ((1 - i) * 0.00085**0.5 + i * 0.012**0.5) ** 2
    check_betas(make_betas("scaled_linear", timesteps), expected, 2e-15)  # measured 6.2e-16, factor 3


def capped(levels):
    """The betas that follow from alphas_cumprod at 0, 1/T, ... 1."""
    return np.minimum(1 - levels[1:] / levels[:-1], 0.999)


@pytest.mark.parametrize("timesteps", LENGTHS)
def test_cosine(timesteps):
    t = np.arange(timesteps + 1) / timesteps
    levels = (1 + np.cos((t + 0.008) / 1.008 * np.pi)) / 2  # cos^2 of the half angle
    betas = make_betas("cosine", timesteps)
    check_betas(betas, capped(levels), 2e-11)  # measured 5.4e-12, since (1 + cos) / 2 loses digits near 0; factor 4
    assert betas[-1] == 0.999
    check_betas((1 - betas).cumprod(0)[:-1], (levels / levels[0])[1:-1], 5e-12)  # measured 1.1e-12, factor 4


@pytest.mark.parametrize("timesteps", LENGTHS)
def test_sigmoid(timesteps):
    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    t = np.arange(timesteps + 1) / timesteps
    levels = (sigmoid(3.0) - sigmoid(-3 + 6 * t)) / (sigmoid(3.0) - sigmoid(-3.0))
    betas = make_betas("sigmoid", timesteps)
    check_betas(betas, capped(levels), 2e-12)  # measured 3.1e-13, factor 6
    assert betas[-1] == 0.999
    check_betas((1 - betas).cumprod(0)[:-1], levels[1:-1], 1e-14)  # measured 2.5e-15, factor 4


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("timesteps", [1, 20, 21, 4000])
def test_betas_in_range(name, timesteps):
    betas = make_betas(name, timesteps)
    assert betas.shape == (timesteps,) and betas.min() > 0
    assert betas.max() <= (0.999 if name in ("cosine", "sigmoid") else 1) and (betas.diff() > 0).all()
    assert betas[-1] == 1 or (name, timesteps) != ("linear", 20)  # it takes no fewer


@for_many(50)
def test_given(device, choose):
    dtype = choose.one_of([torch.float32, torch.float64])
    values = choose.several(lambda: choose.integer(1, 2**20 - 1) / 2**20, 1, 20)
    if choose.one_of([False, True]):
        values[-1] = 1.0
    given_betas = torch.tensor(values, dtype=dtype, device=device, requires_grad=True)
    betas = make_betas(given_betas, len(values))
    assert betas.dtype == torch.float64 and betas.device.type == "cpu" and betas.tolist() == values
    assert not betas.requires_grad
    with torch.no_grad():
        given_betas.fill_(0.5)
    assert betas.tolist() == values  # they are copied


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_zero_terminal_snr(name):
    betas = make_betas(name, 1000)
    rescaled = rescale_zero_terminal_snr(betas)
    assert rescaled.dtype == torch.float64
    before, after = ((1 - b).cumprod(0).sqrt() for b in (betas, rescaled))
    assert after[-1] == 0
    torch.testing.assert_close(after[0], before[0], rtol=1e-15, atol=0)
    # affine in the former values
    fallen = (before[0] - before) / (before[0] - before[-1])
    torch.testing.assert_close((before[0] - after) / before[0], fallen, rtol=1e-9, atol=1e-12)
    assert torch.equal(make_betas(rescaled, 1000), rescaled)  # GaussianDiffusion accepts it as a schedule
    utils = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    peer = utils.rescale_zero_terminal_snr(betas.float())
    torch.testing.assert_close(rescaled.float(), peer, rtol=2e-3, atol=1e-6)  # diffusers computes in float32
