"""diffusers' multistep and consistency schedulers over whole loops, in float64.

Their tables of noise levels are float32; here they get ours in float64, so that both differ by rounding alone.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.gaussian import push, take

from ddpm_ext import GaussianDiffusion
from ddpm_ext.tables.grid import Grid, make_grid
from ddpm_ext.tables.samplers import SAMPLERS, ipndm, lcm, sa_solver, tcd

diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 3, 2)
OPTIONS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEVELS = GaussianDiffusion(1000, diffusers.DDPMScheduler(**OPTIONS).betas).alphas_cumprod
# Of the largest sample; measured 2.8e-14 (deis of order 3), factor 7 for other machines.
RELATIVE = 2e-13
FLOAT32 = 1e-6  # DPMSolverMultistepScheduler's steps are in float32 in any case; measured 3.1e-7, factor 3
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SIGMA_SPACE = ("lms",)  # their sample is ours divided by sqrt(alphas_cumprod)

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
    ("dpmpp_3m", {}, "DPMSolverMultistep", OF_THIRD_ORDER),
    ("dpmpp_3m", {"lower_order_final": False}, "DPMSolverMultistep", {**OF_THIRD_ORDER, "lower_order_final": False}),
]
# Where the grids end. UniPC with bh1, DEIS and DPM-Solver of eps do not arrive at clean data there, or return NaN. PNDM
# takes prev_timestep from a stride that linspace does not have.
ANY = [("linspace", "zero"), ("leading", "sigma_min"), ("trailing", "zero")]
NOISY = [("linspace", "sigma_min"), ("leading", "sigma_min")]
ENDS = {"unipc": ANY, "dpmpp_3m": ANY, "deis": NOISY, "dpm_solver_2m": NOISY}
ENDS["lms"] = [("leading", "zero"), ("trailing", "zero")]
ENDS["plms"] = [("leading", "sigma_min"), ("leading", "zero"), ("trailing", "zero")]
EACH = [
    (*case, ends, how)
    for case in CASES
    for ends in (NOISY if case[1].get("solver") == "bh1" else ENDS[case[0]])
    for how in [*PREDICTIONS, "clipped"]
    if case[0] != "plms" or how == "eps"  # PNDM has no x0, and means of v where the prediction is v
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


def compare(sampler: str, arguments: dict, kind: str, options: dict, steps: int, ends: tuple[str, str], how: str):
    """The greatest difference in a loop, over the largest sample."""
    prediction = "x0" if how == "clipped" else how
    scheduler, grid = make(kind, steps, *ends, prediction_type=PREDICTIONS[prediction], **options)
    table = SAMPLERS[sampler](grid, prediction=prediction, **arguments)
    assert table.timestep.tolist() == scheduler.timesteps.tolist()
    outputs = torch.randn(len(table) + 1, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = outputs[-1].numpy()
    by_sigma = sampler in SIGMA_SPACE
    theirs = outputs[-1] / (table.signal_now[0] if by_sigma else 1)
    history, worst, largest = [], 0.0, 0.0
    for row, t, m in zip(table, scheduler.timesteps, 2 * outputs, strict=False):
        # With a model that predicts x0, a clip of x0 is a clip of the output, which they get clipped already.
        given, clip = (m.clamp(-1, 1), (-1, 1)) if how == "clipped" else (m, None)
        scheduler.is_scale_input_called = True
        theirs = scheduler.step(given, t, theirs).prev_sample
        x0, after = take(row, x, m.numpy(), history=history, clip=clip)
        history = push(row, history, x0, x, m.numpy())
        x = after
        expected = (theirs * (row.signal_after if by_sigma else 1)).numpy()
        assert np.isfinite(expected).all()
        worst, largest = max(worst, abs(x - expected).max()), max(largest, abs(expected).max())
    assert worst > 0
    return worst / largest


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("sampler, arguments, kind, options, ends, how", EACH)
def test_whole_loop(sampler, arguments, kind, options, ends, how, steps):
    bound = FLOAT32 if kind == "DPMSolverMultistep" else RELATIVE
    assert compare(sampler, arguments, kind, options, steps, ends, how) < bound


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
    prediction, clip = ("x0", (-1, 1)) if how == "clipped" else (how, None)
    options = {**theirs, **dict(zip(names, orders, strict=True)), "prediction_type": PREDICTIONS[prediction]}
    scheduler, grid = make("SASolver", steps, spacing, "sigma_min", **options)
    table = sa_solver(grid, prediction=prediction, **arguments, **dict(zip(names, orders, strict=True)))
    assert table.timestep.tolist() == scheduler.timesteps.tolist()
    draws = torch.randn(2, steps + 1, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sample, x, history, largest = draws[0, -1], draws[0, -1].numpy(), [], 0.0
    for row, t, m, z in zip(table, scheduler.timesteps, *draws, strict=False):
        monkeypatch.setattr(diffusers.schedulers.scheduling_sasolver, "randn_tensor", lambda *_, z=z, **__: z)
        sample = scheduler.step(m if clip is None else m.clamp(*clip), t, sample).prev_sample
        x0, after = take(row, x, m.numpy(), z=z.numpy(), history=history, clip=clip)
        history, x = push(row, history, x0, x, m.numpy()), after
        largest = max(largest, sample.abs().max().item())
        assert abs(x - sample.numpy()).max() < RELATIVE * largest


KDPM2 = {
    "dpm_2": ("KDPM2Discrete", {}),
    "dpm_2_ancestral": ("KDPM2AncestralDiscrete", {"eta": 1.0}),
}


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
    outputs = torch.randn(len(table) + 1, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sample, x, history = outputs[-1] / table.signal_now[0], outputs[-1].numpy(), []
    for row, t, m in zip(table, scheduler.timesteps, outputs, strict=False):
        z = torch.full(SHAPE, 0.5, dtype=torch.float64)
        if "Ancestral" in kind:
            module = diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete
            monkeypatch.setattr(module, "randn_tensor", lambda *_, z=z, **__: z)
        scheduler.is_scale_input_called = True
        sample = scheduler.step(m, t, sample).prev_sample
        x0, after = take(row, x, m.numpy(), z.numpy(), history=history)
        history, x = push(row, history, x0, x, m.numpy()), after
        expected = sample.numpy() * row.signal_after
        assert abs(x - expected).max() < 5e-6 * max(1, abs(expected).max())  # measured 1.6e-6, factor 3


@pytest.mark.parametrize("steps", [5, 20])
def test_ipndm(steps):
    """diffusers' has levels of its own unless it is given others, and takes a model that predicts v. From pure noise,
    where its levels begin, it divides by 1e-8."""
    levels = torch.cat([LEVELS[torch.arange(steps, 0, -1) * 900 // steps], torch.ones(1)])
    scheduler = diffusers.IPNDMScheduler(trained_betas=(1 - levels).sqrt().tolist())
    scheduler.set_timesteps(steps)
    scheduler.alphas, scheduler.betas = levels.sqrt(), (1 - levels).sqrt()
    grid = Grid(torch.arange(steps, 0, -1), levels, 1 - levels[:-1] / levels[1:])
    x, *outputs = torch.randn(steps + 1, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theirs, x, history = x, x.numpy(), []
    for row, t, m in zip(ipndm(grid, prediction="v"), scheduler.timesteps, outputs, strict=True):
        theirs = scheduler.step(m, t, theirs).prev_sample
        x0, after = take(row, x, m.numpy(), history=history)
        history, x = push(row, history, x0, x, m.numpy()), after
        assert abs(x - theirs.numpy()).max() < 1e-12 * max(1, abs(x).max())


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_lcm(monkeypatch, steps, clip, prediction):
    """Each step from a sample of its own, with the noise fed in."""
    clipped = {} if clip is None else {"clip_sample": True, "clip_sample_range": clip}
    scheduler = diffusers.LCMScheduler(**OPTIONS, prediction_type=PREDICTIONS[prediction], **clipped)
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = LEVELS
    table = lcm(make_grid(LEVELS, scheduler.timesteps), prediction=prediction)
    draws = torch.randn(steps, 3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for row, t, (x, m, z) in zip(table, scheduler.timesteps, draws, strict=True):
        monkeypatch.setattr(diffusers.schedulers.scheduling_lcm, "randn_tensor", lambda *_, z=z, **__: z)
        expected = scheduler.step(m, t, x).prev_sample.numpy()
        _, found = take(row, *(value.numpy() for value in (x, m)), z=z.numpy(), clip=clip and (-clip, clip))
        off = abs(found - expected).max() / max(1, abs(expected).max())
        assert off < 1e-7  # their c_out is float32; measured 3.4e-8, factor 3


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_tcd(monkeypatch, steps, eta, prediction):
    """Each step from a sample of its own, with the noise fed in. Theirs ends at timestep 0."""
    scheduler = diffusers.TCDScheduler(**OPTIONS, prediction_type=PREDICTIONS[prediction])
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = LEVELS
    table = tcd(make_grid(LEVELS, scheduler.timesteps, final=LEVELS[0].item()), prediction=prediction, eta=eta)
    draws = torch.randn(steps, 3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for row, t, (x, m, z) in zip(table, scheduler.timesteps, draws, strict=True):
        monkeypatch.setattr(diffusers.schedulers.scheduling_tcd, "randn_tensor", lambda *_, z=z, **__: z)
        expected = scheduler.step(m, t, x, eta=eta).prev_sample.numpy()
        _, found = take(row, *(value.numpy() for value in (x, m)), z=z.numpy())
        assert abs(found - expected).max() < RELATIVE * max(1, abs(expected).max())
