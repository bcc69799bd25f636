"""diffusers' multistep schedulers over whole loops, in float64.

Their tables of noise levels are float32; here they get ours in float64, so that both differ by rounding alone.
"""

from __future__ import annotations

import pytest
import torch
from support.gaussian import push, take

from ddpm_ext import GaussianDiffusion
from ddpm_ext.tables.samplers import SAMPLERS
from ddpm_ext.tables.spacing import Grid, make_grid

diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 3, 2)
OPTIONS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEVELS = GaussianDiffusion(1000, diffusers.DDPMScheduler(**OPTIONS).betas).alphas_cumprod
RELATIVE = 2e-13  # of the largest sample; measured 2.2e-14 (unipc of order 3), factor 9 for other machines
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SIGMA_SPACE = ("lms",)  # their sample is ours divided by sqrt(alphas_cumprod)

UNIPC = [
    ("unipc", {"order": order, "solver": solver}, "UniPCMultistep", {"solver_order": order, "solver_type": solver})
    for order in (1, 2, 3)
    for solver in ("bh1", "bh2")
]
CASES = [*UNIPC]


def make(kind: str, steps: int, spacing: str, final: str, **options: object) -> tuple[object, Grid]:
    """The scheduler and our grid of its timesteps."""
    made = getattr(diffusers, f"{kind}Scheduler")
    options = {"timestep_spacing": spacing, **options}
    if "final_sigmas_type" in made().config:
        options["final_sigmas_type"] = final
    scheduler = made(**OPTIONS, **options)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.long().unique().flip(0)
    grid = make_grid(LEVELS, timesteps, final=1.0 if final == "zero" else LEVELS[0].item())
    scheduler.alphas_cumprod = LEVELS
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = (1 / grid.alphas_cumprod - 1).sqrt()
    return scheduler, grid


def compare(sampler: str, arguments: dict, kind: str, options: dict, steps: int, ends: tuple[str, str], how: str):
    """The greatest difference in a loop, over the largest sample."""
    prediction = "x0" if how == "clipped" else how
    scheduler, grid = make(kind, steps, *ends, prediction_type=PREDICTIONS[prediction], **options)
    table = SAMPLERS[sampler](grid, prediction=prediction, **arguments)
    assert table.timestep.tolist() == scheduler.timesteps.tolist()
    outputs = torch.randn(len(table) + 1, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = outputs[-1].numpy()
    by_sigma = sampler in SIGMA_SPACE
    theirs = outputs[-1] / (table.now[0].sqrt() if by_sigma else 1)
    history, worst, largest = [], 0.0, 0.0
    for row, t, m in zip(table, scheduler.timesteps, 2 * outputs, strict=False):
        # With a model that predicts x0, a clip of x0 is a clip of the output, which they get clipped already.
        given, clip = (m.clamp(-1, 1), (-1, 1)) if how == "clipped" else (m, None)
        scheduler.is_scale_input_called = True
        theirs = scheduler.step(given, t, theirs).prev_sample
        x0, after = take(row, x, m.numpy(), history=history, clip=clip)
        history = push(row, history, x0, x, m.numpy())
        x = after
        expected = (theirs * (row.after**0.5 if by_sigma else 1)).numpy()
        worst, largest = max(worst, abs(x - expected).max()), max(largest, abs(expected).max())
    assert worst > 0
    return worst / largest


@pytest.mark.parametrize("sampler, arguments, kind, options", CASES)
@pytest.mark.parametrize("ends", [("linspace", "zero"), ("leading", "sigma_min"), ("trailing", "zero")])
@pytest.mark.parametrize("steps", [5, 10, 20])
@pytest.mark.parametrize("how", [*PREDICTIONS, "clipped"])
def test_whole_loop(how, steps, ends, sampler, arguments, kind, options):
    assert compare(sampler, arguments, kind, options, steps, ends, how) < RELATIVE
