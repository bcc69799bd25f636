"""diffusers' betas beside the schedules, and its sigmas beside the spacings, that have them."""

import pytest
import torch

from ddpm_ext.tables.flow_grids import flow_grid, flow_shift, flow_sigmas, resolution_mu
from ddpm_ext.tables.schedules import make_betas
from ddpm_ext.tables.sigma_grids import ALIGN_YOUR_STEPS, SIGMA_GRIDS, linear_quadratic

diffusers = pytest.importorskip("diffusers")

LEVELS = (1 - make_betas("scaled_linear", 1000)).cumprod(0)


def scheduler(**options):
    return diffusers.EulerDiscreteScheduler(1000, 0.00085, 0.012, "scaled_linear", **options)


def test_betas():
    """test_lucidrains_losses.py has the other schedules, in float64."""
    betas = scheduler().betas  # float32
    torch.testing.assert_close(make_betas("scaled_linear", 1000), betas.double(), rtol=1e-6, atol=2.0**-24)


@pytest.mark.parametrize("steps", [2, 7, 30])
@pytest.mark.parametrize("name, option", [("exponential", "exponential"), ("beta_sigmas", "beta")])
def test_sigmas(name, option, steps):
    euler = scheduler(**{f"use_{option}_sigmas": True})
    euler.set_timesteps(steps)
    grid = SIGMA_GRIDS[name](LEVELS, steps)
    torch.testing.assert_close((1 / grid.now - 1).sqrt().float(), euler.sigmas[:-1], rtol=1e-4, atol=0)
    torch.testing.assert_close(grid.timestep.float(), euler.timesteps, rtol=1e-4, atol=1e-2)


PUBLISHED = {"sd15": "StableDiffusion", "sdxl": "StableDiffusionXL", "svd": "StableDiffusionVideo"}


@pytest.mark.parametrize("model", ALIGN_YOUR_STEPS)
def test_align_your_steps_as_published(model):
    """Apart from the last sigma, which is 0 in diffusers."""
    assert list(ALIGN_YOUR_STEPS[model][:-1]) == diffusers.schedulers.AysSchedules[f"{PUBLISHED[model]}Sigmas"][:-1]


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_align_your_steps(model):
    sigmas = diffusers.schedulers.AysSchedules[f"{PUBLISHED[model]}Sigmas"]
    euler = scheduler()
    euler.set_timesteps(sigmas=sigmas)
    grid = SIGMA_GRIDS["align_your_steps" if model == "sd15" else "align_your_steps_sdxl"](LEVELS, 10)
    torch.testing.assert_close(grid.timestep.float(), euler.timesteps, rtol=1e-4, atol=1e-2)
    assert list(ALIGN_YOUR_STEPS["svd"][:-1]) == diffusers.schedulers.AysSchedules["StableDiffusionVideoSigmas"][:-1]


@pytest.mark.parametrize("steps", [2, 3, 25])
def test_linear_quadratic(steps):
    mochi = pytest.importorskip("diffusers.pipelines.mochi.pipeline_mochi")
    for threshold in (0.025, 0.1):
        theirs = torch.tensor(mochi.linear_quadratic_schedule(steps, threshold), dtype=torch.float64)
        torch.testing.assert_close(linear_quadratic(steps, threshold), theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("steps", [2, 5, 28])
@pytest.mark.parametrize(
    "theirs, ours",
    [
        ({"shift": 3.0}, {"shift": 3.0}),
        ({"shift": 0.5, "use_karras_sigmas": True}, {"shift": 0.5, "curve": "karras"}),
        ({"shift": 2.0, "use_exponential_sigmas": True}, {"shift": 2.0, "curve": "exponential"}),
        ({"use_beta_sigmas": True}, {"curve": "beta"}),
        ({"shift": 3.0, "shift_terminal": 0.1}, {"shift": 3.0, "terminal": 0.1}),
        *(
            (
                {"shift": 3.0, "shift_terminal": 0.1, f"use_{curve}_sigmas": True},
                {"shift": 3.0, "terminal": 0.1, "curve": curve},
            )
            for curve in ("karras", "exponential", "beta")
        ),
    ],
)
def test_flow_sigmas(theirs, ours, steps):
    flow = diffusers.FlowMatchEulerDiscreteScheduler(1000, **theirs)
    flow.set_timesteps(steps)
    least = flow_shift(torch.tensor(1e-3, dtype=torch.float64), ours.get("shift", 1.0)).item()
    compare_flow(flow, flow_sigmas(steps, least=least, **ours))


@pytest.mark.parametrize("mu", [0.4, 1.15])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize(
    "options",
    [{}, {"shift_terminal": 0.1}, {"use_karras_sigmas": True}, {"shift_terminal": 0.1, "use_karras_sigmas": True}],
)
def test_flow_sigmas_by_mu(options, kind, mu):
    """As Flux's pipeline gives them, and LTX's with a terminal."""
    flow = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind, **options)
    flow.set_timesteps(sigmas=[1 - i / 12 for i in range(12)], mu=mu)
    ours = {"terminal": options.get("shift_terminal"), "curve": "karras" if "use_karras_sigmas" in options else None}
    ours |= {"mu": mu} if kind == "exponential" else {"shift": mu}
    compare_flow(flow, flow_sigmas(12, **ours))


def compare_flow(flow, sigma):
    grid = flow_grid(sigma)
    torch.testing.assert_close(grid.pairs[1].float(), flow.sigmas, rtol=1e-5, atol=0)
    torch.testing.assert_close(grid.timestep.float(), flow.timesteps, rtol=1e-5, atol=0)


def test_flow_shift_of_a_resolution():
    flux = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux")
    for tokens in (64, 256, 1024, 4096, 6400):
        assert resolution_mu(tokens) == pytest.approx(flux.calculate_shift(tokens), rel=1e-12)
        own = resolution_mu(tokens, base_tokens=1024, max_tokens=8192, base_mu=0.95, max_mu=2.05)
        assert own == pytest.approx(flux.calculate_shift(tokens, 1024, 8192, 0.95, 2.05), rel=1e-12)
