"""The loop's options: given step tables, what it records, and where it starts."""

import numpy as np
import pytest
import torch
from support.gaussian import TIMESTEPS, diffusion, exact_model

import ddpm_ext
from ddpm_ext import GaussianDiffusion, Philox
from ddpm_ext.loop.rows import CACHED
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.on_device import KernelTables
from ddpm_ext.tables.samplers import SAMPLERS
from ddpm_ext.tables.sigma_grids import karras_grid, log_snr_grid
from ddpm_ext.tables.spacing import spaced_timesteps
from ddpm_ext.tables.step_table import StepTable

# Those whose rows read what the rows before found or kept.
OF_HIGHER_ORDER = [
    name
    for name, sampler in SAMPLERS.items()
    if (table := sampler(make_grid(diffusion().alphas_cumprod, [90, 60, 30]))).history
]
backends = pytest.mark.parametrize("backend", ["fused", "reference"])


def test_a_second_loop_makes_no_table(run, device, monkeypatch):
    """A second loop does not copy a table to the device either, which a CUDA graph could not capture."""
    gd, options = diffusion(), {"sampler": "ddim", "steps": 7, "eta": 0.5, "rng": Philox(2), "record": "last"}
    first = run(gd, **options)
    for steps in (3, 4, 5):
        run(gd, sampler="ddim", steps=steps)
    with monkeypatch.context() as patch:
        for cls in (StepTable, KernelTables):
            patch.setattr(cls, "__init__", None)
        assert torch.equal(run(gd, **options), first)
    for steps in range(1, 2 * CACHED):
        run(gd, sampler="ddim", steps=steps)
    assert len(gd._loop_rows) <= CACHED
    assert torch.equal(run(gd, **options), first)
    run(gd, sampler="ddim", steps=1)
    for steps, error in ((True, TypeError), (1.0, TypeError), ([1], TypeError)):  # not taken for the 1 that is kept
        with pytest.raises(error, match="steps is"):
            run(gd, sampler="ddim", steps=steps)
    run(gd, sampler="ddim", timesteps=[9, 0])
    with pytest.raises(TypeError, match="timestep has dtype"):
        run(gd, sampler="ddim", timesteps=[9.0, 0.0])


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "euler", "spacing": "trailing", "steps": 10},
        {"sampler": "euler_ancestral", "timesteps": [99, 50, 20, 3]},
        {"sampler": "ddim", "eta": 0.5, "spacing": "ddim10"},
        {"sampler": "euler", "spacing": "karras", "steps": 8},
        {"sampler": "euler_ancestral", "spacing": "log_snr", "steps": 8},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_given_table_gives_the_samples_of_its_sampler(run, device, options):
    """A given table gives the samples of its sampler. The model gets fractional timesteps as float32."""
    gd, told = diffusion(), []
    exact = exact_model(gd)

    def model(x, t):
        told.append(t)
        return exact(x, t.long())

    by_name = gd.p_sample_loop(model, (4, 5), rng=Philox(1), record="last", progress=False, device=device, **options)
    name, steps, eta = options["sampler"], options.get("steps"), options.get("eta")
    spacing = options.get("spacing", "linspace")
    if spacing in ("karras", "log_snr"):
        grid = {"karras": karras_grid, "log_snr": log_snr_grid}[spacing](gd.alphas_cumprod, steps)
    else:
        chosen = options.get("timesteps")
        chosen = spaced_timesteps(TIMESTEPS, steps, spacing) if chosen is None else chosen
        grid = make_grid(gd.alphas_cumprod, chosen, betas=gd.betas)
    table = SAMPLERS[name](grid, **({} if eta is None else {"eta": eta}))
    assert torch.stack(told)[:, 0].dtype == (torch.float32 if table.timestep.is_floating_point() else torch.int64)
    assert torch.equal(torch.stack(told)[:, 0].cpu(), table.timestep.to(told[0].dtype))
    for _ in range(2):
        by_table = gd.p_sample_loop(
            model, (4, 5), sampler=table, rng=Philox(1), record="last", progress=False, device=device
        )
        assert torch.equal(by_table, by_name)


def test_callback_sees_each_step_and_may_end_the_loop(run, device):
    gd, seen = diffusion(), []
    every = run(gd, steps=10, record="all")

    def watch(record):
        seen.append((record.step, record.timestep, record.x_t.cpu().numpy().copy()))

    assert all(map(np.array_equal, run(gd, steps=10, callback=watch), every))
    assert [step for step, _, _ in seen] == list(range(10))
    assert [t for _, t, _ in seen] == spaced_timesteps(TIMESTEPS, 10).tolist()
    assert all(np.array_equal(x, e) for (_, _, x), e in zip(seen, every, strict=True))
    for record, kept in (("all", [0, 1, 2, 3]), (3, [2, 3]), ([0, 2, 8], [0, 2])):
        ended = run(gd, steps=10, record=record, callback=lambda r: r.step == 3)
        assert len(ended) == len(kept)
        assert all(np.array_equal(x, every[i]) for x, i in zip(ended, kept, strict=True))
    ended = run(gd, steps=10, record="last", callback=lambda r: r.step == 3)
    assert np.array_equal(ended.cpu().numpy(), every[3])


def test_progressive(run, device):
    """The generator takes the same steps, each when it is requested, and records no gradients."""
    gd, calls = diffusion(), []
    exact = exact_model(gd)

    def model(x, t):
        calls.append(t)
        assert not torch.is_grad_enabled()
        return exact(x, t)

    options = {"sampler": "ddim", "eta": 0.3, "steps": 6, "rng": Philox(4), "device": device}
    every = gd.p_sample_loop(exact, (3, 5), record="all", progress=False, **options)
    walk = gd.sample_progressive(model, (3, 5), **options)
    for i, expected in enumerate(every):
        assert len(calls) == i
        record = next(walk)
        assert record.step == i
        assert record.timestep == calls[-1][0]
        assert np.array_equal(record.x_t.cpu().numpy(), expected)
        assert torch.is_grad_enabled()
    assert next(walk, None) is None
    with pytest.raises(ValueError, match="sampler is 'dpm'"):
        gd.sample_progressive(model, (3, 5), sampler="dpm")


@backends
@pytest.mark.parametrize(
    "sampler, strength, taken", [("ddpm", 0.29, 29), ("ddim", 0.5, 50), ("euler_ancestral", 1.0, 100)]
)
def test_start_by_hand(run, device, backend, sampler, strength, taken):
    """The image gets the starting noise of the first step that is taken. The remaining steps are as usual."""
    gd = diffusion(backend=backend)
    start = torch.linspace(-1, 1, 15, device=device).reshape(3, 5)
    ids = torch.tensor([4, 2**33, 0], device=device)
    x = gd.q_sample(start, taken - 1, rng=Philox(6, ids, stream=1, draw=0))
    table = SAMPLERS[sampler](make_grid(gd.alphas_cumprod, range(TIMESTEPS - 1, -1, -1), betas=gd.betas))
    options = {"rng": Philox(6, ids), "device": device, "start": start}
    recorded = gd.p_sample_loop(exact_model(gd), (3, 5), sampler=sampler, strength=strength, progress=False, **options)
    assert len(recorded) == taken
    assert torch.equal(start, torch.linspace(-1, 1, 15, device=device).reshape(3, 5))
    ops = gd.ops
    for i in range(TIMESTEPS - taken, TIMESTEPS):
        m = exact_model(gd)(x, torch.full((3,), TIMESTEPS - 1 - i, device=device))
        x = ops.reverse_step(x, m, table.packed(device), i, clip=(-1.0, 1.0), rng=Philox(6, ids))
        assert np.array_equal(recorded[i - TIMESTEPS + taken], x.cpu().numpy())
    by_table = gd.p_sample_loop(
        exact_model(gd), (3, 5), sampler=table, strength=strength, record="last", progress=False, **options
    )
    assert torch.equal(by_table, x)


@backends
@pytest.mark.parametrize("sampler", OF_HIGHER_ORDER)
@pytest.mark.parametrize("strength, taken", [(0.9, 9), (0.4, 4), (0.1, 1)])
def test_a_start_of_higher_order_begins_at_first_order(device, backend, sampler, strength, taken):
    """As if the sampler's timesteps were the last ones alone. Strength counts steps: each of heun's has two rows, and
    so has the first of plms."""
    gd = diffusion(backend=backend)
    timesteps = list(range(TIMESTEPS - 1, -1, -TIMESTEPS // 10))
    start = torch.linspace(-1, 1, 15, device=device).reshape(3, 5)
    options = {"rng": Philox(6), "device": device, "start": start, "progress": False, "clip_denoised": False}
    found = gd.p_sample_loop(
        exact_model(gd), (3, 5), sampler=sampler, timesteps=timesteps, strength=strength, **options
    )
    last = gd.p_sample_loop(exact_model(gd), (3, 5), sampler=sampler, timesteps=timesteps[-taken:], **options)
    assert len(found) == len(SAMPLERS[sampler](make_grid(gd.alphas_cumprod, timesteps[-taken:])))
    assert all(map(np.array_equal, found, last))


def test_start_of_no_signal_is_pure_noise(run, device):
    """If no signal of the start is left, the loop begins with the starting noise."""
    betas = torch.linspace(0.1, 1.0, 20, dtype=torch.float64)
    gd = GaussianDiffusion(20, betas, prediction="x0")
    options = {"rng": Philox(3), "progress": False, "record": "last", "device": device}
    start = torch.full((4, 6), 0.7, device=device)
    loops = [gd.p_sample_loop(lambda x, t: 0.5 * x, (4, 6), start=s, **options) for s in (None, start)]
    assert torch.equal(*loops)


def test_start_between_timesteps(run, device):
    """With Karras' sigmas, the start gets the noise of the first step that is taken."""
    gd, told = diffusion(), []
    start = torch.ones(2, 7, device=device)
    grid = karras_grid(gd.alphas_cumprod, 10)

    def model(x, t):
        told.append((x.clone(), t[0].item()))
        return 0 * x

    options = {"start": start, "rng": Philox(2), "device": device, "progress": False}
    gd.p_sample_loop(model, (2, 7), sampler="euler", spacing="karras", steps=10, strength=0.4, **options)
    first, t = told[0]
    z = ddpm_ext.randn((2, 7), Philox(2), stream=1, draw=0, device=device)
    expected = grid.now[6].sqrt() * start.double() + (1 - grid.now[6]).sqrt() * z.double()
    torch.testing.assert_close(first.double(), expected, rtol=3e-7, atol=3e-7)
    assert t == grid.timestep[6].float().item()
    assert len(told) == 4
    table = SAMPLERS["euler"](grid)
    gd.p_sample_loop(model, (2, 7), sampler=table, strength=0.4, **options)
    assert torch.equal(told[4][0], first)
    bare = StepTable(table.timestep, table.a, table.b, table.c0, table.c1)  # doesn't say where it starts
    with pytest.raises(ValueError, match="start is given beside a sampler whose table has no level"):
        gd.p_sample_loop(model, (2, 7), sampler=bare, **options)
