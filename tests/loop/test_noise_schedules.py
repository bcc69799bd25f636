"""Loops over levels that are pairs: flow, sigma space and EDM, from noise, from images, around known parts, upwards."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.choices import for_many

from ddpm_ext import GaussianDiffusion, Inpaint, Interpolation, Philox, randn
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import make_loop_rows
from ddpm_ext.tables.levels import LEVELS
from ddpm_ext.tables.samplers import SAMPLERS
from ddpm_ext.tables.schedules import NoiseSchedule, edm, sigma_space

F64 = torch.float64
T = 24
SIGMAS = torch.linspace(math.log(0.02), math.log(60), T, dtype=F64).exp()
RISING = torch.linspace(0.05, 1, T, dtype=F64)
SCHEDULES = {
    "flow": "flow",
    "sigma space": sigma_space(SIGMAS),
    "edm": edm(SIGMAS, 0.4),
    "curved": NoiseSchedule(1.2 - RISING**2, RISING.sqrt()),
}
SHAPE = (2, 3, 4)


def normals(count, seed):
    return torch.randn(count, *SHAPE, dtype=F64, generator=torch.Generator().manual_seed(seed))


def wavy(scale):
    """A model of variance-preserving samples, for samples that are `scale` times as large at each call."""
    scales = iter(scale)

    def model(x, t):
        x = x / next(scales)
        return torch.sin(2 * x) + 0.3 * torch.cos(5 * x)

    return model


@for_many(60)
def test_loops_are_the_variance_preserving_ones_scaled(choose):
    """By any sampler, from noise, from an image, between two, or around a known part, with jumps back."""
    schedule = SCHEDULES[choose.one_of(list(SCHEDULES), "schedule")]
    prediction = choose.one_of(["eps", "x0", "v", "flow", "edm"], "prediction")
    ours = GaussianDiffusion(T, schedule, prediction=prediction, backend="reference")
    unit = GaussianDiffusion(T, ours.betas, prediction=prediction, backend="reference")
    sampler = choose.one_of(list(SAMPLERS), "sampler")
    first, second, known, z = normals(4, choose.integer(0, 99, "seed"))
    begin = choose.one_of(["noise", "start", "lerp", "slerp"], "begin")
    options = {"sampler": sampler, "timesteps": [23, 17, 9, 8, 2, 0], "progress": False, "dtype": F64, "rng": Philox(3)}
    if begin == "start":
        options |= {"start": first, "strength": 0.7}
    elif begin != "noise":
        options["start"] = Interpolation(first, second, 0.3, begin)
    if choose.one_of([False, True], "inpaint"):
        mask = torch.rand(SHAPE, dtype=F64, generator=torch.Generator().manual_seed(1))
        jumps = choose.integer(1, 3, "jumps") if sampler in ("ddpm", "ddim", "euler") else 1
        options["inpaint"] = Inpaint(known, mask, jump_length=2, jump_n_sample=jumps)
    taken = {name: value for name, value in options.items() if name != "progress"}
    rows = make_loop_rows(ours, LoopOptions(**taken))
    table, asked = rows.table, [kind.calls_model for kind in rows.needs]
    before, after = (
        [math.hypot(*pair) for pair in zip(*(getattr(table, name).tolist() for name in names), strict=True)]
        for names in (LEVELS[:2], LEVELS[2:])
    )
    loops = []
    for gd, scale in ((ours, before), (unit, [1.0] * len(before))):
        given = {} if "start" in options else {"noise": z * scale[0]}
        model = wavy(itertools.compress(scale, asked))
        loops.append(gd.p_sample_loop(model, SHAPE, **options, **given))
    for found, expected, r in zip(*loops, after, strict=True):
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected) * r, rtol=1e-7, atol=1e-8)


# ------------------------------------------------------------------------------------------------------- from noise


@pytest.mark.parametrize(
    ("schedule", "deviation"),
    [("linear", 1.0), ("flow", 1.0), (sigma_space(SIGMAS), 60.0), (edm(SIGMAS), 60 / (60**2 + 0.25) ** 0.5)],
    ids=["linear", "flow", "sigma space", "edm"],
)
def test_pure_noise_has_the_first_levels_deviation(device, schedule, deviation):
    """Sigma space begins from sigma_max times a standard normal, as k-diffusion does. Noise that is given stays."""
    gd, seen = GaussianDiffusion(T, schedule, prediction="x0"), []
    options = {"rng": Philox(5), "progress": False, "device": device, "sampler": "euler"}

    def model(x, t):
        seen.append(x.clone())
        return x

    z = randn(SHAPE, Philox(5), stream=1, device=device)
    for record in gd.sample_progressive(model, SHAPE, **options):
        assert record.step == 0
        break
    next(gd.sample_progressive(model, SHAPE, **options, noise=z))
    torch.testing.assert_close(seen[0], z * deviation, rtol=1e-6, atol=0)
    assert torch.equal(seen[1], z)
    table = SAMPLERS["euler"](gd.grid(), prediction="x0")
    next(GaussianDiffusion(T).sample_progressive(model, SHAPE, **{**options, "sampler": table}))
    assert torch.equal(seen[2], seen[0])  # the table knows


# ------------------------------------------------------------------------------- the spacing of a loop that names none

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


@pytest.mark.parametrize("schedule", ["flow", "edm"])
def test_a_row_without_a_call_has_its_steps_timestep(schedule):
    """The second row of a step of dpmpp_2m_cfg_pp starts at clean data, for which edm's logarithm of sigma is none."""
    gd = GaussianDiffusion(T, SCHEDULES[schedule], prediction=schedule)
    options = {"sampler": "dpmpp_2m_cfg_pp", "steps": 4, "spacing": "karras"}
    told = [record.timestep for record in gd.sample_progressive(lambda x, t: 0.1 * x, SHAPE, **options)]
    assert told == sorted(told, reverse=True) and len(set(told)) == 4 < len(told)
