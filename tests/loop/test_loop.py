"""The loop with a denoiser whose exact answer is known, see support/gaussian.py: what it records, where it runs and
starts, and step tables that are given. test_options.py compares what each step computes with plain_loop.py."""

import sys

import numpy as np
import pytest
import torch
from support.gaussian import TIMESTEPS, diffusion, exact_model

import ddpm_ext
from ddpm_ext import Interpolation, Philox
from ddpm_ext.loop.rows import CACHED
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.on_device import KernelTables
from ddpm_ext.tables.samplers import SAMPLERS
from ddpm_ext.tables.sigma_grids import karras_grid, log_snr_grid
from ddpm_ext.tables.spacing import spaced_timesteps
from ddpm_ext.tables.step_table import StepTable

SHAPE = (4, 2, 3)
LEVELS = diffusion().alphas_cumprod
# Those whose rows read what the rows before found or kept.
OF_HIGHER_ORDER = [name for name, of in SAMPLERS.items() if of(make_grid(LEVELS, [90, 60, 30])).history]
backends = pytest.mark.parametrize("backend", ["fused", "reference"])


def test_loop_is_p_sample_again_and_again(run, device):
    """x_T has stream 1 and draw 0, the noise of a step stream 0 and draw t. The model gets a t for every sample."""
    gd, rng, told = diffusion(), Philox(2, 40), []

    def model(x, t):
        told.append(t.clone())
        return exact_model(gd)(x, t)

    x, downwards = ddpm_ext.randn(SHAPE, rng, stream=1, draw=0, device=device), range(TIMESTEPS - 1, -1, -1)
    samples = run(gd, model=model, rng=rng)
    assert [t.tolist() for t in told] == [[t] * 4 for t in downwards]
    assert all(t.dtype == torch.int64 and t.device == device for t in told)
    for t, recorded in zip(downwards, samples, strict=True):
        x = gd.p_sample(exact_model(gd), x, t, False, rng=rng)
        assert torch.equal(torch.from_numpy(recorded), x.cpu())


@backends
def test_record(run, backend):
    gd = diffusion(backend=backend)
    every = run(gd, steps=10, record="all")
    assert isinstance(every, list) and len(every) == 10
    assert all(isinstance(x, np.ndarray) and x.shape == SHAPE for x in every)
    assert len({x.tobytes() for x in every}) == 10  # they are copies and not one buffer
    last = run(gd, steps=10, record="last")
    copy = last.clone()
    run(gd, steps=10, record="last", rng=Philox(99))
    assert np.array_equal(last.cpu().numpy(), every[-1]) and torch.equal(last, copy)  # it belongs to the caller
    by_count = ((1, range(10)), (3, (2, 5, 8, 9)), (4, (3, 7, 9)), (5, (4, 9)), (10, (9,)), (99, (9,)))
    for record, kept in (*by_count, *((steps, sorted(steps)) for steps in ([0], [9], (7, 2, 3), []))):
        some = run(gd, steps=10, record=record)
        assert len(some) == len(kept)
        assert all(np.array_equal(x, every[i]) for x, i in zip(some, kept, strict=True))


def test_device_follows_the_model(device):
    gd, seen = diffusion(), []

    class Model(torch.nn.Module):
        def __init__(self, device):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones((), device=device))

        def forward(self, x, t):
            seen.append((x.device, t.device))
            return x

    options = {"steps": 1, "record": "last", "progress": False}
    gd.p_sample_loop(Model(device), SHAPE, **options)
    for asked in (device, str(device), device.type):  # the argument `device` comes before the model's device
        result = gd.p_sample_loop(Model("meta"), SHAPE, device=asked, **options)
        assert result.device == device
    assert seen == [(device, device)] * 4


@backends
def test_sample_ids_where_a_device_is_asked_for_by_its_type(run, device, backend):
    """ "cuda" means the current GPU, and tensors on it have the device "cuda:0"."""
    gd, rng = diffusion(backend=backend), Philox(9, torch.tensor([5, 2**40, 0, 1], device=device))
    options = {"steps": 3, "rng": rng, "record": "last"}
    assert torch.equal(run(gd, device=device.type, **options), run(gd, device=device, **options))


def test_progress(run, capfd, monkeypatch):
    pytest.importorskip("tqdm")
    run(diffusion(), steps=3, progress=True)  # no terminal
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(diffusion(), steps=3, progress=False)
    assert capfd.readouterr() == ("", "")
    run(diffusion(), steps=3, progress=True)
    assert "3/3" in "".join(capfd.readouterr())
    for name in ("tqdm", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, name, None)
    assert len(run(diffusion(), steps=3, progress=True)) == 3
    out, err = capfd.readouterr()
    assert out == "" and err in ("", "no progress bar without tqdm: pip install tqdm\n")  # told once in a process


def test_a_second_loop_makes_no_table(run, monkeypatch):
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


def test_callback_sees_each_step_and_may_end_the_loop(run):
    gd, seen = diffusion(), []
    every = run(gd, steps=10, record="all")

    def watch(record):
        seen.append((record.step, record.timestep, record.x_t.cpu().numpy().copy()))

    assert all(map(np.array_equal, run(gd, steps=10, callback=watch), every))
    assert [step for step, _, _ in seen] == list(range(10))
    assert [t for _, t, _ in seen] == spaced_timesteps(TIMESTEPS, 10).tolist()
    assert all(np.array_equal(x, e) for (_, _, x), e in zip(seen, every, strict=True))
    for record, kept in (("all", [0, 1, 2, 3]), (3, [2, 3]), (np.int64(3), [2, 3]), ([0, 2, 8], [0, 2])):
        ended = run(gd, steps=10, record=record, callback=lambda r: r.step == 3)
        assert len(ended) == len(kept)
        assert all(np.array_equal(x, every[i]) for x, i in zip(ended, kept, strict=True))
    ended = run(gd, steps=10, record="last", callback=lambda r: r.step == 3)
    assert np.array_equal(ended.cpu().numpy(), every[3])


@backends
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_no_gradient_leads_back_to_where_a_loop_begins(backend, guidance, device):
    """After an even number of steps the last samples are in the memory of the first."""
    gd, x = diffusion(backend=backend), torch.ones(SHAPE, device=device, requires_grad=True)
    images, weight = (x.detach(), -x.detach()), torch.full((4,), 0.25, device=device, requires_grad=True)
    options = {"steps": 2, "guidance": guidance, "progress": False, "record": "last"}
    for begin in ({"noise": x}, {"start": x}, {"start": Interpolation(*images, weight)}):
        assert not gd.p_sample_loop(lambda x, t: x / 2, SHAPE, **begin, **options).requires_grad


def test_progressive(device):
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


@pytest.mark.parametrize(
    "options, strength, timesteps",
    [
        ({"sampler": "ddpm"}, 0.29, range(28, -1, -1)),
        ({"sampler": "euler_ancestral"}, 1.0, range(99, -1, -1)),
        ({"sampler": "euler_ancestral", "timesteps": [99, 50, 20, 3]}, 0.75, [50, 20, 3]),
        ({"sampler": "ddim", "eta": 0.5, "spacing": "ddim10"}, 0.5, range(40, -1, -10)),
        ({"sampler": "euler", "spacing": "trailing", "steps": 10}, 1.0, range(99, -1, -10)),
        ({"sampler": "euler", "spacing": "karras", "steps": 10}, 0.4, karras_grid(LEVELS, 10).timestep[-4:]),
        ({"sampler": "euler_ancestral", "spacing": "log_snr", "steps": 8}, 1.0, log_snr_grid(LEVELS, 8).timestep),
    ],
)
def test_a_start_leaves_the_first_steps_out(device, options, strength, timesteps):
    """The model gets fractional timesteps as float32, and the caller's image stays."""
    gd, told, start = diffusion(), [], torch.linspace(-1, 1, 15, device=device).reshape(3, 5)
    shared = {"strength": strength, "start": start, "device": device, "progress": False}
    recorded = gd.p_sample_loop(lambda x, t: told.append(t[0].cpu()) or 0.5 * x, (3, 5), **shared, **options)
    expected = torch.as_tensor(timesteps)
    assert torch.equal(torch.stack(told), expected.float() if expected.is_floating_point() else expected)
    assert len(recorded) == len(expected)
    assert torch.equal(start, torch.linspace(-1, 1, 15, device=device).reshape(3, 5))


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
