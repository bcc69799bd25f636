"""diffusers' DPM-Solver++ and Heun schedulers, given the same noise.

In single steps the rows are evaluated in float64, so that only the peer's own float32 errors remain.
"""

import pytest
import torch
from support.gaussian import take

from ddpm_ext import GaussianDiffusion, Philox, randn
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import dpmpp_2m, dpmpp_2m_sde, heun
from ddpm_ext.tables.sigma_grids import karras_grid

diffusers = pytest.importorskip("diffusers")

SHAPE = (3, 2, 5)
OPTIONS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# Of the terms' size: their lambdas are logarithms of float32 sigmas, and a step is the difference of two of them.
RELATIVE = 4e-5  # measured 1.2e-5 (Heun), 1.1e-5 (DPM-Solver++), factor 3

predictions = pytest.mark.parametrize(
    "prediction, theirs", [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")]
)
SPACINGS = ("linspace", "leading", "trailing", "karras")
# where the last timestep is not 0 already, the last step may end there
ENDS = [*((spacing, "zero") for spacing in SPACINGS), ("linspace", "sigma_min"), ("leading", "sigma_min")]


def make(name, steps, spacing, final="zero", **options):
    """The scheduler and our grid of its timesteps."""
    if spacing == "karras":
        options["use_karras_sigmas"] = True
    else:
        options["timestep_spacing"] = spacing
    scheduler = getattr(diffusers, name)(**OPTIONS, **options)
    scheduler.set_timesteps(steps)
    levels = GaussianDiffusion(1000, scheduler.betas).alphas_cumprod
    final = 1.0 if final == "zero" else levels[0].item()
    if spacing == "karras":
        return scheduler, karras_grid(levels, steps, final=final)
    return scheduler, make_grid(levels, scheduler.timesteps.long().unique().flip(0), final=final)


def normals(count, seed):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)).unbind(0)


def size(row, x, m, h, z):
    """The size of the terms that a step adds up."""
    x0 = abs(row.a * x) + abs(row.b * m)
    terms = (row.c0 * x0, row.c1 * x, row.c2 * m, row.h1 * h, row.s * z)
    return sum(abs(term) for term in terms)


def worst(found, expected, scale):
    return (abs(found - expected.double().numpy()) / scale).max()


@predictions
@pytest.mark.parametrize("spacing, final", ENDS)
@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_dpm_solver(algorithm, steps, spacing, final, prediction, theirs):
    """Each step has a sample of its own, and the x0 of a step before."""
    options = {"algorithm_type": algorithm, "prediction_type": theirs, "final_sigmas_type": final}
    scheduler, grid = make("DPMSolverMultistepScheduler", steps, spacing, final, **options)
    sampler = dpmpp_2m if algorithm == "dpmsolver++" else dpmpp_2m_sde
    table = sampler(grid, prediction=prediction)
    assert len(table) == len(scheduler.timesteps)
    x0 = None
    for i, (row, t) in enumerate(zip(table, scheduler.timesteps, strict=True)):
        x, m, z = normals(3, i)
        expected = scheduler.step(m, t, x, variance_noise=z).prev_sample
        x, m, z = (value.double().numpy() for value in (x, m, z))
        h = 0.0 if row.h1 == 0 else x0
        x0, found = take(row, x, m, z, history=[h])
        off = worst(found, expected, size(row, x, m, h, z))
        assert off <= RELATIVE, (i, off)


@predictions
@pytest.mark.parametrize("spacing", SPACINGS)
def test_heun(spacing, prediction, theirs):
    """Their sample is ours divided by sqrt(alphas_cumprod). A step's second model call begins from the result of its
    first."""
    scheduler, grid = make("HeunDiscreteScheduler", 28, spacing, prediction_type=theirs)
    table = heun(grid, prediction=prediction)
    assert len(table) == len(scheduler.timesteps) == 55
    if spacing != "karras":  # theirs are rounded, in float32
        assert scheduler.timesteps.tolist() == table.timestep.tolist()
    for i, (row, t) in enumerate(zip(table, scheduler.timesteps, strict=True)):
        start, m = normals(2, i)
        if row.h1 == 0:
            x, h, scale, outer = start.double().numpy(), 0.0, 0.0, start / row.signal_now
        m64 = m.double().numpy()
        outer = scheduler.step(m, t, outer).prev_sample
        scale = scale + size(row, x, m64, h, 0.0)
        h, x = take(row, x, m64, history=[h])
        off = worst(x, outer * row.signal_after, scale)
        assert off <= RELATIVE, (i, off)


@pytest.mark.parametrize(
    "sampler, name, options",
    [
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
        ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("heun", "HeunDiscreteScheduler", {}),
    ],
)
def test_loop(sampler, name, options, device):
    """From the same start to the same image."""
    scheduler, grid = make(name, 20, "trailing", **options)
    gd, rng = GaussianDiffusion(1000, scheduler.betas), Philox(1)
    by_sigma = sampler == "heun"  # whose sample is divided by sqrt(alphas_cumprod)

    def model(x, t):
        return 0.9 * x

    x = randn(SHAPE, rng, stream=1, device=device) / (grid.now[0].sqrt().item() if by_sigma else 1)
    for t in scheduler.timesteps:
        noise = {} if by_sigma else {"variance_noise": randn(SHAPE, rng, draw=int(t), device=device)}
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, **noise).prev_sample
    ours = gd.p_sample_loop(
        model,
        SHAPE,
        sampler=sampler,
        steps=20,
        spacing="trailing",
        clip_denoised=False,
        rng=rng,
        record="last",
        progress=False,
        device=device,
    )
    torch.testing.assert_close(ours, x, rtol=0, atol=7e-6)  # measured 2.3e-6 (Heun), factor 3
