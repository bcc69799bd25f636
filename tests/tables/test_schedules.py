"""The schedules' betas: their range, those that are given, and a terminal SNR of zero."""

import pytest
import torch
from support.choices import for_many
from support.tutorial import linear_betas

from ddpm_ext.tables.schedules import SCHEDULES, make_betas, rescale_zero_terminal_snr


@pytest.mark.parametrize("timesteps", [20, 50, 1000])
def test_linear(timesteps):
    """Peers' tests have this schedule and the others at 1,000 timesteps."""
    torch.testing.assert_close(make_betas("linear", timesteps), linear_betas(timesteps), rtol=2e-15, atol=0)


def test_ends():
    """Those of Stable Diffusion (Rombach et al. 2022), and the largest beta of Nichol & Dhariwal 2021, section 3.2."""
    assert make_betas("scaled_linear", 1000)[[0, -1]].tolist() == pytest.approx([0.00085, 0.012], rel=1e-12)
    assert make_betas("cosine", 1000)[-1] == 0.999


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
    peer = pytest.importorskip("diffusers.schedulers.scheduling_ddim").rescale_zero_terminal_snr(betas.float())
    torch.testing.assert_close(rescaled.float(), peer, rtol=2e-3, atol=1e-6)  # diffusers computes in float32
