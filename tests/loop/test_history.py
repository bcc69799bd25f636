"""Loops whose rows read what earlier rows kept: a ring of three tensors, beside any option, against the equation in
float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.choices import Choose, for_many

import ddpm_ext
from ddpm_ext import DynamicThreshold, GaussianDiffusion, Guidance, Inpaint, Philox
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import SAMPLERS, ddim

SHAPE, TIMESTEPS, STEPS = (3, 2, 5, 4), 50, 7
RNG = Philox(5)
GRID = make_grid(GaussianDiffusion(TIMESTEPS).alphas_cumprod, range(TIMESTEPS - 1, -1, -8))
HISTORY = [name for name, sampler in SAMPLERS.items() if sampler(GRID).history]
NOISY = ("edm", "restart", "dpmpp_2s", "lcm", "tcd")  # some call the model twice a step, or add noise between steps
backends = pytest.mark.parametrize("backend", ["fused", "reference"])
# Relative to the largest number that a loop has met, 1 or more. Measured worst of 800 loops: 1.5e-5.
CLOSE = 5e-5


def model(x, t):
    return 0.3 * x + (t.to(x.dtype) / 100).reshape(-1, 1, 1, 1) * x.clamp(-1, 1)


def unconditional(x, t):
    return model(x, t) * 0.5 - 0.1


def both(x, t):
    if len(x) == SHAPE[0]:
        return model(x, t)
    return torch.cat([unconditional(*(half.chunk(2)[0] for half in (x, t))), model(*(h.chunk(2)[1] for h in (x, t)))])


def variance_of(x, positive):
    return x * x * 0.01 if positive else (x * 0.75).clamp(-1, 1)


def cond_fn(x, t):
    return (0.5 - x) * 0.25 + (t.to(x.dtype) / 400).reshape(-1, 1, 1, 1)


def image(seed, device="cpu", dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def make_table(**changes):
    """Rows of random numbers beside ddim's: all three slots are read once there are as many; one row keeps nothing."""
    base = ddim(GRID, eta=0.7)
    normal = torch.randn(9, STEPS, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 4
    columns = dict(zip(("cu", "h1", "h2", "h3", "k0", "k1", "k2", "g0", "g1"), normal, strict=True))
    for slot in (1, 2, 3):
        columns[f"h{slot}"][:slot] = 0
    for name in ("k0", "k1", "k2"):
        columns[name][4] = 0
    return replace(base, **columns | changes)


def by_hand(table, *, scale=None, clip=(-1.0, 1.0), gradient=False, known=None, mask=None, quantile=None, learned=None):
    """The samples and the predicted clean samples after each row, by the equation of StepTable in float64.

    learned: "log" or "direct", how the model's own variance is read.
    """
    x, x0 = ddpm_ext.randn(SHAPE, RNG, stream=1, draw=0).double().numpy(), np.zeros(SHAPE)
    history, samples = [], []
    for row in table:
        t, x_t = torch.full(SHAPE[:1], row.timestep), torch.from_numpy(x)
        calls_model = row.b != 0 or row.c2 != 0 or row.cu != 0
        m = model(x_t, t).numpy() if calls_model else 0 * x
        u = m if scale is None or not calls_model else unconditional(x_t, t).numpy()
        m = m if scale is None else u + scale * (m - u)
        clean = row.a * x + row.b * m
        if quantile is not None and calls_model:
            bound = np.quantile(np.abs(clean).reshape(len(clean), -1), quantile, axis=1).clip(1).reshape(-1, 1, 1, 1)
            clean = clean / bound
        clean = clean if clip is None else clean.clip(*clip)
        g = cond_fn(x_t, t).numpy() if gradient and calls_model else 0 * x
        clean, deviation = clean + row.g0 * g, 1.0
        if learned is not None and calls_model:
            v = variance_of(x_t, learned == "direct").numpy()
            deviation = np.exp(row.l0 + row.l1 * v) if learned == "log" else np.sqrt(np.maximum(v, 2.0**-100))
        z = ddpm_ext.randn(SHAPE, RNG, draw=row.draw).double().numpy()
        new = row.c0 * clean + row.c1 * x + row.c2 * m + row.cu * u
        new = new + sum(h * kept for h, kept in zip((row.h1, row.h2, row.h3), history, strict=False))
        new = new + deviation**2 * row.g1 * g + deviation * row.s * z
        if row.k0 or row.k1 or row.k2:
            history = [row.k0 * clean + row.k1 * x + row.k2 * m, *history[:2]]
        if known is not None:
            new = mask * (row.signal_after * known + row.noise_after * z) + (1 - mask) * new
        x, x0 = new, clean if calls_model else x0
        samples.append((x, x0))
    return samples


def run(gd, table, device, model=model, **options):
    options = {"rng": RNG, "device": device, "progress": False, **options}
    return gd.p_sample_loop(model, SHAPE, sampler=table, **options)


def check(gd, table, device, expected, **options):
    seen, largest = [], 1.0
    run(gd, table, device, callback=lambda r: seen.append([x if x is None else x.clone() for x in r[2:]]), **options)
    assert len(seen) == len(expected)
    for found, truth in zip(seen, expected, strict=True):
        largest = max(largest, *(np.abs(x).max() for x in truth))
        for x, exact in zip(found, truth, strict=True):
            assert x is None or np.abs(x.double().cpu().numpy() - exact).max() <= CLOSE * largest


@backends
@for_many(60)
def test_any_option_beside_any_history(device, backend, choose: Choose):
    sampler = choose.one_of([*HISTORY, *NOISY, "random rows", "random rows"], "sampler")
    prediction = choose.one_of(["eps", "x0", "v"], "prediction") if sampler != "random rows" else "eps"
    table = make_table() if sampler == "random rows" else SAMPLERS[sampler](GRID, prediction=prediction)
    how, ours, variance, of_loop = {}, {}, "fixed_small", model
    if choose.one_of([False, True], "guided"):
        how["scale"] = choose.one_of([0.5, 1.0, 2.5], "scale")
        doubled = choose.one_of([False, True], "doubled")
        of_loop = both if doubled else model
        ours["guidance"] = how["scale"] if doubled else Guidance(how["scale"], unconditional)
    if choose.one_of([False, True], "gradient"):
        how["gradient"], ours["cond_fn"] = True, cond_fn
    if choose.one_of([False, True], "inpaint"):
        mask = (image(7) > 0).double() * choose.one_of([1.0, 0.75], "share")
        how |= {"known": image(6).numpy(), "mask": mask.numpy()}
        ours["inpaint"] = Inpaint(image(6, device, torch.float32), mask.to(device, torch.float32))
    if choose.one_of([False, True], "threshold"):
        how |= {"quantile": 0.7}
        ours["clip_denoised"] = DynamicThreshold(0.7)
    else:
        how["clip"] = choose.one_of([None, (-1.0, 1.0), (-0.2, 0.3)], "clip")
        ours["clip_denoised"] = how["clip"] or False
    if choose.one_of([False, True], "learned"):
        how["learned"] = choose.one_of(["log", "direct"], "variance")
        variance = {"log": "learned_range", "direct": "learned_variance"}[how["learned"]]
        few = torch.randn(2, len(table), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.3
        own = {"l0": few[0] - 1, "l1": few[1]} if how["learned"] == "log" else {}
        table = replace(table, s=torch.ones(len(table)), **own)
        single, positive = of_loop, how["learned"] == "direct"

        def with_variance(single):
            return lambda x, t: torch.cat([single(x, t), variance_of(x, positive)], 1)

        of_loop = with_variance(single)
        if "guidance" in ours and not isinstance(ours["guidance"], float):
            ours["guidance"] = Guidance(how["scale"], with_variance(unconditional))
    ours["x0"] = choose.one_of([False, True], "x0")
    gd = GaussianDiffusion(TIMESTEPS, backend=backend, variance=variance, prediction=prediction)
    check(gd, table, device, by_hand(table, **how), model=of_loop, **ours)


def test_bits_do_not_depend_on_the_batch(device):
    """Of any split into batches, of the doubled batch of guidance, and of a second run."""
    table, gd = make_table(), GaussianDiffusion(TIMESTEPS)
    whole = run(gd, table, device, record="last")
    assert torch.equal(run(gd, table, device, record="last"), whole)
    options = {"sampler": table, "device": device, "progress": False, "record": "last"}
    for i in range(3):
        part = gd.p_sample_loop(model, (1, *SHAPE[1:]), rng=Philox(5, i), **options)
        assert torch.equal(part, whole[i : i + 1])
    guided = run(gd, table, device, record="last", guidance=Guidance(2.5, unconditional))
    assert torch.equal(run(gd, table, device, model=both, record="last", guidance=2.5), guided)
