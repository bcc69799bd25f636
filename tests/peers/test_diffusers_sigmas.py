"""diffusers' DPM-Solver++, Heun and Euler schedulers, given the same noise.

In single steps the rows are evaluated in float64, so that only the peer's own float32 errors remain.
"""

import importlib

import pytest
import torch
from support.gaussian import take

from ddpm_ext import GaussianDiffusion
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import SAMPLERS
from ddpm_ext.tables.sigma_grids import karras_grid

diffusers = pytest.importorskip("diffusers")

SHAPE = (3, 2, 5)
OPTIONS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# Of the terms' size: their lambdas are logarithms of float32 sigmas, and a step is the difference of two of them.
RELATIVE = 4e-5  # measured 1.2e-5 (Heun), 1.1e-5 (DPM-Solver++), 6.0e-6 (Euler), factor 3
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
# Our name, theirs, their options, and whether their sample is ours divided by sqrt(alphas_cumprod).
SAMPLED = [
    ("dpmpp_2m", "DPMSolverMultistep", {}, False),
    ("dpmpp_2m_sde", "DPMSolverMultistep", SDE, False),
    ("heun", "HeunDiscrete", {}, True),
    ("euler", "EulerDiscrete", {}, True),
    ("euler_ancestral", "EulerAncestralDiscrete", {}, True),
]
# Where the last timestep is not 0 already, the last step may end there.
ENDS = [
    *((spacing, "zero") for spacing in ("linspace", "leading", "trailing", "karras")),
    *((spacing, "sigma_min") for spacing in ("linspace", "leading")),
]


def make(name, steps, spacing, final="zero", **options):
    """The scheduler and our grid of its timesteps."""
    options |= {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
    options |= {} if final == "zero" else {"final_sigmas_type": final}
    scheduler = getattr(diffusers, f"{name}Scheduler")(**OPTIONS, **options)
    scheduler.set_timesteps(steps)
    levels = GaussianDiffusion(1000, scheduler.betas).alphas_cumprod
    final = 1.0 if final == "zero" else levels[0].item()
    if spacing == "karras":
        return scheduler, karras_grid(levels, steps, final=final)
    return scheduler, make_grid(levels, scheduler.timesteps.long().unique().flip(0), final=final)


def draw_given(monkeypatch, scheduler, z):
    module = importlib.import_module(type(scheduler).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: z, raising=False)


def size(row, x, m, h, z):
    """The size of the terms that a step adds up."""
    x0 = abs(row.a * x) + abs(row.b * m)
    return sum(map(abs, (row.c0 * x0, row.c1 * x, row.c2 * m, row.h1 * h, row.s * z)))


@pytest.mark.parametrize(
    ("sampler", "name", "options", "by_sigma", "spacing", "final", "prediction"),
    [
        (*each, *ends, prediction)
        for each in SAMPLED
        for ends in (ENDS if each[1].startswith("DPM") else ENDS[1:3] if "ancestral" in each[0] else ENDS[:4])
        for prediction in (("eps", "v") if each[0].startswith("euler") else PREDICTIONS)
    ],
)
@pytest.mark.parametrize("steps", [10, 28])  # with which linspace has whole timesteps
def test_steps(monkeypatch, sampler, name, options, by_sigma, spacing, final, prediction, steps):
    """Each step has a sample of its own, and the x0 of a step before. Heun's second model call begins from the result
    of its first."""
    scheduler, grid = make(name, steps, spacing, final, prediction_type=PREDICTIONS[prediction], **options)
    table = SAMPLERS[sampler](grid, prediction=prediction)
    assert len(table) == len(scheduler.timesteps)
    if spacing != "karras":  # theirs are rounded, in float32
        assert scheduler.timesteps.tolist() == table.timestep.tolist()
    kept, scheduler.is_scale_input_called = 0.0, True
    for i, (row, t) in enumerate(zip(table, scheduler.timesteps, strict=True)):
        x, m, z = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(i)).unbind(0)
        h, goes_on = (kept, sampler == "heun") if row.h1 else (0.0, False)
        if not goes_on:
            outer, scale, start = x / (row.signal_now if by_sigma else 1), 0.0, x.double().numpy()
        draw_given(monkeypatch, scheduler, z)
        outer = scheduler.step(m, t, outer, **({"variance_noise": z} if options else {})).prev_sample
        m, z = m.double().numpy(), z.double().numpy()
        scale = scale + size(row, start, m, h, z)
        kept, start = take(row, start, m, z, history=[h])
        expected = outer.double().numpy() * (row.signal_after if by_sigma else 1)
        assert (abs(start - expected) / scale).max() <= RELATIVE, i
