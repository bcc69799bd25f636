"""diffusers' multistep and consistency schedulers over whole loops, in float64.

Their tables of noise levels are float32; here they get ours in float64, so that both differ by rounding alone.
"""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from support.gaussian import push, take

from ddpm_ext import GaussianDiffusion
from ddpm_ext.tables.grid import Grid, make_grid
from ddpm_ext.tables.samplers import SAMPLERS, ipndm, sa_solver

diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 3, 2)
OPTIONS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEVELS = GaussianDiffusion(1000, diffusers.DDPMScheduler(**OPTIONS).betas).alphas_cumprod
# Of the largest sample; measured 2.8e-14 (deis of order 3), factor 7 for other machines.
RELATIVE = 2e-13
FLOAT32 = 1e-6  # the steps of these are in float32 in any case; measured 3.1e-7, factor 3
IN_FLOAT32 = ("DPMSolverMultistep", "EulerDiscrete")
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SIGMA_SPACE = ("euler", "lms")  # their sample is ours divided by sqrt(alphas_cumprod)

UNIPC = [
    ("unipc", {"order": order, "solver": solver}, "UniPCMultistep", {"solver_order": order, "solver_type": solver})
    for order in (1, 2, 3)
    for solver in ("bh1", "bh2")
]
DEIS = [("deis", {"order": order}, "DEISMultistep", {"solver_order": order}) for order in (1, 2, 3)]
OF_SECOND_ORDER = {"solver_order": 2, "algorithm_type": "dpmsolver"}
OF_THIRD_ORDER = {"solver_order": 3, "solver_type": "heun"}
CASES = [
    *UNIPC,
    *DEIS,
    ("plms", {}, "PNDM", {"skip_prk_steps": True}),
    ("lms", {}, "LMSDiscrete", {}),
    ("dpm_solver_2m", {}, "DPMSolverMultistep", OF_SECOND_ORDER),
    ("euler", {}, "EulerDiscrete", {}),
    ("dpmpp_2m", {}, "DPMSolverMultistep", {}),
    ("dpmpp_3m", {}, "DPMSolverMultistep", OF_THIRD_ORDER),
    ("dpmpp_3m", {"lower_order_final": False}, "DPMSolverMultistep", {**OF_THIRD_ORDER, "lower_order_final": False}),
]
# Where the grids end. UniPC with bh1, DEIS and DPM-Solver of eps do not arrive at clean data there, or return NaN. PNDM
# takes prev_timestep from a stride that linspace does not have.
ANY = [("linspace", "zero"), ("leading", "sigma_min"), ("trailing", "zero")]
NOISY = [("linspace", "sigma_min"), ("leading", "sigma_min")]
ENDS = {"unipc": ANY, "dpmpp_2m": ANY, "dpmpp_3m": ANY, "deis": NOISY, "dpm_solver_2m": NOISY}
ENDS["lms"] = ENDS["euler"] = [("leading", "zero"), ("trailing", "zero")]
ENDS["plms"] = [("leading", "sigma_min"), ("leading", "zero"), ("trailing", "zero")]
# The orders of the last steps depend on whether there are 15. PNDM's stride divides the number of timesteps.
STEPS = (2, 14, 15), (2, 5, 20)
EACH = [
    (*case, ends, how, steps)
    for case in CASES
    for ends in (NOISY if case[1].get("solver") == "bh1" else ENDS[case[0]])
    for how in [*PREDICTIONS, "clipped"]
    if case[0] != "plms" or how == "eps"  # PNDM has no x0, and means of v where the prediction is v
    for steps in (STEPS[case[0] == "plms"] if how in ("eps", "clipped") else (5,))
]


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
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = LEVELS, grid.after[-1]
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = (1 / grid.alphas_cumprod - 1).sqrt()
    return scheduler, grid


def normals(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def draw_given(monkeypatch, scheduler, z):
    monkeypatch.setattr(importlib.import_module(type(scheduler).__module__), "randn_tensor", lambda *_, **__: z)


def compare(table, scheduler, start, outputs, *, clip=None, by_sigma=False, noise=None, monkeypatch=None):
    """The greatest difference in a loop from `start`, over the largest sample.

    Args:
        by_sigma: their sample is ours divided by sqrt(alphas_cumprod).
        noise: each step's, which monkeypatch feeds to them.
    """
    x, theirs = start.numpy(), start / (table.signal_now[0] if by_sigma else 1)
    history, worst, largest = [], 0.0, 0.0
    for i, (row, t, m) in enumerate(zip(table, scheduler.timesteps, outputs, strict=True)):
        z = None if noise is None else noise[i]
        if z is not None:
            draw_given(monkeypatch, scheduler, z)
        scheduler.is_scale_input_called = True
        # With a model that predicts x0, a clip of x0 is a clip of the output, which they get clipped already.
        theirs = scheduler.step(m if clip is None else m.clamp(*clip), t, theirs).prev_sample
        x0, after = take(row, x, m.numpy(), 0.0 if z is None else z.numpy(), history=history, clip=clip)
        history, x = push(row, history, x0, x, m.numpy()), after
        expected = (theirs * (row.signal_after if by_sigma else 1)).numpy()
        assert np.isfinite(expected).all()
        worst, largest = max(worst, abs(x - expected).max()), max(largest, abs(expected).max())
    assert worst > 0 or len(table) < 3
    return worst / largest


def of(how: str) -> tuple[str, tuple[int, int] | None]:
    """A prediction, and a clip."""
    return ("x0", (-1, 1)) if how == "clipped" else (how, None)


@pytest.mark.parametrize("sampler, arguments, kind, options, ends, how, steps", EACH)
def test_whole_loop(sampler, arguments, kind, options, ends, how, steps):
    prediction, clip = of(how)
    scheduler, grid = make(kind, steps, *ends, prediction_type=PREDICTIONS[prediction], **options)
    table = SAMPLERS[sampler](grid, prediction=prediction, **arguments)
    assert table.timestep.tolist() == scheduler.timesteps.tolist()
    *outputs, start = normals(len(table) + 1)
    found = compare(table, scheduler, start, [2 * m for m in outputs], clip=clip, by_sigma=sampler in SIGMA_SPACE)
    assert found < (FLOAT32 if kind in IN_FLOAT32 else RELATIVE)


@pytest.mark.parametrize("how, spacing", [("v", "linspace"), ("clipped", "leading")])
@pytest.mark.parametrize("orders", [(2, 2), (3, 4), (1, 3)])
@pytest.mark.parametrize(
    "arguments, theirs",
    [
        ({"interval": (200, 800)}, {}),  # their own function, where it is not given
        ({}, {"tau_func": lambda t: 1.0}),
        ({"eta": 0.4, "lower_order_final": False}, {"tau_func": lambda t: 0.4, "lower_order_final": False}),
        ({"eta": 0.0}, {"tau_func": lambda t: 0.0}),
    ],
    ids=["interval", "sde", "less noise", "flow"],
)
def test_sa_solver(monkeypatch, arguments, theirs, orders, spacing, how):
    """With the noise fed in. Their corrector has the noise of the predictor before it, so that ours needs none."""
    names, steps = ("predictor_order", "corrector_order"), 9
    prediction, clip = of(how)
    options = {**theirs, **dict(zip(names, orders, strict=True)), "prediction_type": PREDICTIONS[prediction]}
    scheduler, grid = make("SASolver", steps, spacing, "sigma_min", **options)
    table = sa_solver(grid, prediction=prediction, **arguments, **dict(zip(names, orders, strict=True)))
    assert table.timestep.tolist() == scheduler.timesteps.tolist()
    (*outputs, start), noise = normals(2, steps + 1)
    assert compare(table, scheduler, start, outputs, clip=clip, noise=noise, monkeypatch=monkeypatch) < RELATIVE


KDPM2 = {"dpm_2": ("KDPM2Discrete", {}), "dpm_2_ancestral": ("KDPM2AncestralDiscrete", {"eta": 1.0})}


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", KDPM2)
def test_midpoints(monkeypatch, name, spacing, prediction):
    """Their tables have no place where all levels could be put in in float64, so that both differ by float32's."""
    kind, arguments = KDPM2[name]
    scheduler = getattr(diffusers, f"{kind}Scheduler")(
        **OPTIONS, timestep_spacing=spacing, prediction_type=PREDICTIONS[prediction]
    )
    scheduler.set_timesteps(7)
    timesteps = scheduler.timesteps[::2].round().long()
    table = SAMPLERS[name](make_grid(LEVELS, timesteps), prediction=prediction, **arguments)
    assert table.timestep.tolist() == pytest.approx(scheduler.timesteps.tolist(), abs=2e-3)
    *outputs, start = normals(len(table) + 1)
    noise = normals(len(table)) if "Ancestral" in kind else None
    found = compare(table, scheduler, start, outputs, by_sigma=True, noise=noise, monkeypatch=monkeypatch)
    assert found < 5e-6  # measured 1.6e-6, factor 3


@pytest.mark.parametrize("steps", [5, 20])
def test_ipndm(steps):
    """diffusers' has levels of its own unless it is given others, and takes a model that predicts v. From pure noise,
    where its levels begin, it divides by 1e-8."""
    levels = torch.cat([LEVELS[torch.arange(steps, 0, -1) * 900 // steps], torch.ones(1)])
    scheduler = diffusers.IPNDMScheduler(trained_betas=(1 - levels).sqrt().tolist())
    scheduler.set_timesteps(steps)
    scheduler.alphas, scheduler.betas = levels.sqrt(), (1 - levels).sqrt()
    grid = Grid(torch.arange(steps, 0, -1), levels, 1 - levels[:-1] / levels[1:])
    start, *outputs = normals(steps + 1)
    assert compare(ipndm(grid, prediction="v"), scheduler, start, outputs) < 1e-12


CLIPPED = {"clip_sample": True, "clip_sample_range": 1.0}


@pytest.mark.parametrize(
    "name, options, clip, arguments, bound",
    [
        ("LCM", {}, None, {}, 1e-7),  # their c_out is float32; measured 3.4e-8, factor 3
        ("LCM", CLIPPED, (-1, 1), {}, 1e-7),
        *(("TCD", {}, None, {"eta": eta}, RELATIVE) for eta in (0.0, 0.3, 1.0)),
    ],
)
@pytest.mark.parametrize("steps, prediction", [(1, "v"), (4, "eps"), (10, "x0")])
def test_consistency(monkeypatch, steps, name, options, clip, arguments, bound, prediction):
    """Each step from a sample of its own, with the noise fed in. TCD's ends at timestep 0."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(**OPTIONS, prediction_type=PREDICTIONS[prediction], **options)
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = LEVELS
    final = 1.0 if name == "LCM" else LEVELS[0].item()
    grid = make_grid(LEVELS, scheduler.timesteps, final=final)
    table = SAMPLERS[name.lower()](grid, prediction=prediction, **arguments)
    for row, t, (x, m, z) in zip(table, scheduler.timesteps, normals(steps, 3), strict=True):
        draw_given(monkeypatch, scheduler, z)
        expected = scheduler.step(m, t, x, **arguments).prev_sample.numpy()
        _, found = take(row, x.numpy(), m.numpy(), z=z.numpy(), clip=clip)
        assert abs(found - expected).max() < bound * max(1, abs(expected).max())
