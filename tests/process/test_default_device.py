"""torch.set_default_device sets where tensors are made that no device is given for.

The tables stay on the CPU nevertheless, and samples on their device."""

from __future__ import annotations

import pytest
import torch

from ddpm_ext import GaussianDiffusion, Guidance, Philox
from ddpm_ext.tables.samplers import SAMPLERS
from ddpm_ext.tables.spacing import SPACINGS

CASES = [(sampler, spacing) for sampler in SAMPLERS for spacing in ("linspace", "karras")]
CASES += [("ddim", spacing) for spacing in (*SPACINGS, "ddim5", "3,2") if spacing != "align_your_steps_svd"]
META = torch.device("meta")  # nothing can be computed on meta, so that any use of the default raises


def model(x, t):
    return x * 0.5


@pytest.fixture
def elsewhere():
    with META:
        yield


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid", "scaled_linear", "given"])
def test_tables(schedule, elsewhere):
    betas = torch.full((50,), 0.01, device="cpu") if schedule == "given" else schedule
    for variance in ("fixed_small", "fixed_large", "learned_range"):
        gd = GaussianDiffusion(50, betas, variance=variance)
        assert gd.alphas_cumprod.device.type == "cpu" and gd.alphas_cumprod[0] > 0


@pytest.mark.parametrize("sampler, spacing", CASES)
def test_loops(sampler, spacing):
    options = {"sampler": sampler, "spacing": spacing, "record": "last", "progress": False, "device": "cpu"}
    options |= {"steps": None if spacing[-1].isdigit() else 5, "rng": Philox(3)}
    expected = GaussianDiffusion(100).p_sample_loop(model, (2, 1, 4, 4), **options)
    with META:
        found = GaussianDiffusion(100).p_sample_loop(model, (2, 1, 4, 4), **options)
    assert torch.equal(found, expected)


def test_options_of_a_loop():
    options = {"record": "last", "progress": False, "device": "cpu", "steps": 5, "rng": Philox(3), "sampler": "ddim"}
    options |= {"guidance": Guidance(3.0, unconditional=lambda x, t: 0.1 * x, interval=(100, 900))}
    expected = GaussianDiffusion(1000).p_sample_loop(model, (2, 1, 4, 4), **options)
    with META:
        found = GaussianDiffusion(1000).p_sample_loop(model, (2, 1, 4, 4), **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{}, {"offset_noise": 0.1, "input_perturbation": 0.1}, {"loss": "vlb"}])
def test_training(options):
    x, t = torch.rand(3, 1, 4, 4), torch.tensor([0, 4, 9])
    expected = GaussianDiffusion(20, "cosine").train_losses(model, x, t, rng=Philox(1), **options)
    bound = GaussianDiffusion(20, "cosine").bits_per_dim(model, x, rng=Philox(1)).total
    with META:
        gd = GaussianDiffusion(20, "cosine")
        assert torch.equal(gd.train_losses(model, x, t, rng=Philox(1), **options), expected)
        assert torch.equal(gd.bits_per_dim(model, x, rng=Philox(1)).total, bound)
