"""The spacing of a loop that names none."""

import pytest
import torch

from ddpm_ext import GaussianDiffusion, Philox

MEAN, DEVIATION = 0.3, 0.5  # as of pixels; data are normal, so that a flow leads from each noise to a known sample


def of_flow(x, t):
    """The exact velocity, E[eps - x0], at x = (1 - sigma) x0 + sigma eps."""
    sigma = t.view(-1, 1).double() / 1000
    variance = (1 - sigma) ** 2 * DEVIATION**2 + sigma**2
    share = (sigma - (1 - sigma) * DEVIATION**2) / variance
    return (share * (x - (1 - sigma) * MEAN) - MEAN).float()


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "unipc"])
def test_few_steps_of_a_flow_come_near_its_samples(sampler):
    """Over "linspace" the step to the least sigma, from 71 times as much, errs."""
    gd, z = GaussianDiffusion(1000, "flow", prediction="flow"), torch.linspace(-3.4, 3.4, 69)[:, None]

    def error(**options):
        options |= {"noise": z, "clip_denoised": False, "record": "last", "progress": False}
        found = gd.p_sample_loop(of_flow, z.shape, sampler=sampler, steps=15, **options)
        return (found - MEAN - DEVIATION * z).abs().max().item()

    assert error() < 0.02 and error(spacing="linspace") > 0.2


def test_a_loop_over_all_timesteps_is_the_same_with_every_spacing():
    gd, options = GaussianDiffusion(50), {"rng": Philox(0), "record": "last", "progress": False}
    one, other = (gd.p_sample_loop(lambda x, t: 0.1 * x, (2, 3), spacing=s, **options) for s in (None, "linspace"))
    assert torch.equal(one, other)
