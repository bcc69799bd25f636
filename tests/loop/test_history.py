"""Loops whose rows read what earlier rows kept: a ring of three tensors, against the equation in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import ddpm_ext
from ddpm_ext import DynamicThreshold, GaussianDiffusion, Guidance, Inpaint, Philox
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import ddim

SHAPE, TIMESTEPS, STEPS = (3, 2, 5, 4), 50, 7
RNG = Philox(5)
backends = pytest.mark.parametrize("backend", ["fused", "reference"])
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def model(x, t):
    return 0.3 * x + (t.to(x.dtype) / 100).reshape(-1, 1, 1, 1) * x.clamp(-1, 1)


def unconditional(x, t):
    return model(x, t) * 0.5 - 0.1


def levels():
    return GaussianDiffusion(TIMESTEPS).alphas_cumprod


def make_table(**changes):
    """Seven rows of random numbers beside ddim's: all three slots are read once there are as many; one row keeps
    nothing."""
    base = ddim(make_grid(levels(), range(TIMESTEPS - 1, -1, -8)), eta=0.7)
    normal = torch.randn(7, STEPS, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 4
    columns = dict(zip(("cu", "h1", "h2", "h3", "k0", "k1", "k2"), normal, strict=True))
    for slot in (1, 2, 3):
        columns[f"h{slot}"][:slot] = 0
    for name in ("k0", "k1", "k2"):
        columns[name][4] = 0
    return replace(base, g0=None, g1=None, **columns | changes)


def by_hand(table, *, scale=None, clip=(-1.0, 1.0), known=None, mask=None, threshold=None, first=None):
    """The samples after each row, by the equation of StepTable in float64."""
    x = ddpm_ext.randn(SHAPE, RNG, stream=1, draw=0).double().numpy() if first is None else first
    history, samples = [], []
    for row in table:
        t = torch.full(SHAPE[:1], row.timestep)
        m = model(torch.from_numpy(x), t).numpy()
        u = m if scale is None else unconditional(torch.from_numpy(x), t).numpy()
        m = m if scale is None else u + scale * (m - u)
        x0 = row.a * x + row.b * m
        if threshold is not None:
            bound = np.quantile(np.abs(x0).reshape(len(x0), -1), threshold, axis=1).clip(1).reshape(-1, 1, 1, 1)
            x0 = x0 / bound
        x0 = x0.clip(*clip)
        z = ddpm_ext.randn(SHAPE, RNG, draw=row.draw).double().numpy()
        read = sum(h * kept for h, kept in zip((row.h1, row.h2, row.h3), history, strict=False))
        new = row.c0 * x0 + row.c1 * x + row.c2 * m + row.cu * u + read + row.s * z
        if row.k0 or row.k1 or row.k2:
            history = [row.k0 * x0 + row.k1 * x + row.k2 * m, *history[:2]]
        x = new
        if known is not None:
            noised = row.signal_after * known + row.noise_after * z
            x = mask * noised + (1 - mask) * x
        samples.append(x)
    return samples


def run(gd, table, device, **options):
    options = {"rng": RNG, "device": device, "progress": False, **options}
    return gd.p_sample_loop(model, SHAPE, sampler=table, **options)


def assert_close(found, expected):
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, **CLOSE)


@backends
@pytest.mark.parametrize("clip", [(-1.0, 1.0), (-0.2, 0.3)])
def test_every_step(backend, device, clip):
    table = make_table()
    found = run(GaussianDiffusion(TIMESTEPS, backend=backend), table, device, clip_denoised=clip)
    assert_close(found, by_hand(table, clip=clip))


@backends
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_guided(backend, device, scale):
    """cu multiplies the unconditional output, also where the scale is 1."""
    table, gd = make_table(), GaussianDiffusion(TIMESTEPS, backend=backend)
    found = run(gd, table, device, guidance=Guidance(scale, unconditional))
    assert_close(found, by_hand(table, scale=scale))


@backends
def test_a_known_part(backend, device):
    table, gd = make_table(), GaussianDiffusion(TIMESTEPS, backend=backend)
    known = torch.linspace(-1, 1, 120, device=device).reshape(SHAPE)
    mask = (torch.arange(120, device=device) % 3 == 0).reshape(SHAPE)
    found = run(gd, table, device, inpaint=Inpaint(known, mask))
    assert_close(found, by_hand(table, known=known.double().cpu().numpy(), mask=mask.double().cpu().numpy()))


@backends
def test_thresholded(backend, device):
    table, gd = make_table(), GaussianDiffusion(TIMESTEPS, backend=backend)
    found = run(gd, table, device, clip_denoised=DynamicThreshold(0.7))
    assert_close(found, by_hand(table, threshold=0.7))


def test_the_predicted_clean_samples(device):
    table, gd = make_table(), GaussianDiffusion(TIMESTEPS)
    found = run(gd, table, device, record="x0")
    before = [ddpm_ext.randn(SHAPE, RNG, stream=1, draw=0).double().numpy(), *by_hand(table)]
    for row, x, x0 in zip(table, before, found, strict=False):
        m = model(torch.from_numpy(x), torch.full(SHAPE[:1], row.timestep)).numpy()
        np.testing.assert_allclose(x0, (row.a * x + row.b * m).clip(-1, 1), **CLOSE)


def test_bits_do_not_depend_on_the_batch(device):
    """Of any split into batches, of the doubled batch of guidance, and of a second run."""
    table, gd = make_table(), GaussianDiffusion(TIMESTEPS)
    whole = run(gd, table, device, record="last")
    assert torch.equal(run(gd, table, device, record="last"), whole)
    for i in range(3):
        part = gd.p_sample_loop(
            model, (1, *SHAPE[1:]), sampler=table, rng=Philox(5, i), device=device, progress=False, record="last"
        )
        assert torch.equal(part, whole[i : i + 1])

    def both(x, t):
        half = len(x) // 2
        return torch.cat([unconditional(x[:half], t[:half]), model(x[half:], t[half:])])

    guided = run(gd, table, device, record="last", guidance=Guidance(2.5, unconditional))
    doubled = gd.p_sample_loop(
        both, SHAPE, sampler=table, guidance=2.5, rng=RNG, device=device, progress=False, record="last"
    )
    assert torch.equal(doubled, guided)


def test_a_step_is_one_launch_and_allocates_nothing():
    table, gd = make_table(), GaussianDiffusion(TIMESTEPS)
    output = torch.zeros(SHAPE)
    loop = gd.sample_progressive(lambda x, t: output, SHAPE, sampler=table, rng=RNG)
    next(loop)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        next(loop)
    events = [event for event in profile.events() if event.name.startswith(("aten::", "ddpm_ext::"))]
    assert [event.name for event in events if event.name.startswith("ddpm_ext::")] == ["ddpm_ext::step_with_options"]
    assert not [event.name for event in events if event.cpu_memory_usage > 0]


def test_refusals():
    gd = GaussianDiffusion(TIMESTEPS)

    def refused(match, table, **options):
        with pytest.raises(ValueError, match=match):
            run(gd, table, "cpu", **options)

    early = torch.zeros(STEPS, dtype=torch.float64)
    early[1] = 0.5
    refused("row 1 has h2 0.5, but 1 rows of the loop before it keep a tensor", make_table(h2=early))
    refused("cond_fn is given, expected a sampler whose table says g0", make_table(), cond_fn=lambda x, t: x)
    refused("row 0 has h1", make_table()[2:])
    with pytest.raises(ValueError, match="has history"):
        ddpm_ext.tables.samplers.repaint(make_table())
