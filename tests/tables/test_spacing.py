"""Spacings: which timesteps a loop takes, and alphas_cumprod at each."""

import pytest
import torch
from support.choices import for_many

from ddpm_ext.tables.schedules import make_betas
from ddpm_ext.tables.spacing import karras_grid, log_snr_grid, section_timesteps, spaced_timesteps

LEVELS = (1 - make_betas("scaled_linear", 1000)).cumprod(0)


@for_many(200)
def test_spaced_timesteps(choose):
    timesteps = choose.integer(1, 5000)
    steps = choose.integer(1, timesteps)
    spaced = spaced_timesteps(timesteps, steps)
    assert spaced.dtype == torch.int64
    assert spaced.shape == (steps,)
    assert spaced[0] == timesteps - 1
    if steps > 1:
        assert spaced[-1] == 0
        gaps = -spaced.diff()
        assert gaps.min() >= 1  # descending and distinct
        assert (gaps - (timesteps - 1) / (steps - 1)).abs().max() <= 1  # even spacing, up to the rounding of both ends


@for_many()
def test_spaced_timesteps_all(choose):
    timesteps = choose.integer(1, 5000)
    assert torch.equal(spaced_timesteps(timesteps, None), torch.arange(timesteps - 1, -1, -1))
    assert torch.equal(spaced_timesteps(timesteps, timesteps), torch.arange(timesteps - 1, -1, -1))


@pytest.mark.parametrize(
    "steps, error", [(0, ValueError), (-1, ValueError), (101, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_spaced_timesteps_bad(steps, error):
    with pytest.raises(error, match=f"steps is {steps}"):
        spaced_timesteps(100, steps)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 333, 999, 1000])
def test_spacings_are_diffusers(spacing, steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(1000, timestep_spacing=spacing, steps_offset=0)
    scheduler.set_timesteps(steps)
    # With one step diffusers starts from timestep 0, where there is no noise to remove.
    if spacing == "linspace" and steps == 1:
        assert spaced_timesteps(1000, 1).tolist() == [999]
    else:
        assert spaced_timesteps(1000, steps, spacing).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [1, 2, 10, 20, 50, 250, 1000])
def test_quadratic(steps):
    """tau_i = floor(c i^2) up to 0.8 T (Song et al. 2021, appendix), or the next timestep that is not taken yet."""
    spaced = spaced_timesteps(1000, steps, "quadratic").flip(0).double()
    i = torch.arange(steps, dtype=torch.float64)
    exact = 800 * (i / max(1, steps - 1)) ** 2
    assert (spaced.diff() >= 1).all()
    free = (spaced - exact).abs() < 1 + 1e-9
    assert (free | (spaced > exact)).all()
    assert (free[1:] | (spaced.diff() == 1)).all()
    assert free[0]
    assert spaced[-1] < 1000


@for_many(100)
def test_sections(choose):
    """Each section has its count of timesteps, evenly spaced, with both of its ends."""
    timesteps = choose.integer(10, 2000)
    number = choose.integer(1, 5)
    counts = [choose.integer(1, timesteps // number) for _ in range(number)]
    taken = section_timesteps(timesteps, counts).flip(0)
    assert torch.equal(taken, spaced_timesteps(timesteps, None, ",".join(map(str, counts))).flip(0))
    assert len(taken) == sum(counts)
    assert (taken.diff() > 0).all()
    start = 0
    for i, count in enumerate(counts):
        length = timesteps // number + (i < timesteps % number)
        section = taken[(taken >= start) & (taken < start + length)]
        assert len(section) == count
        assert section[0] == start
        assert count == 1 or section[-1] == start + length - 1
        start += length


def test_sections_round_as_guided_diffusion_does():
    """Where a position falls on a half, the stride's sum in floating point decides: its `10,15,20` of 300 timesteps
    takes 149, where the exact position is 149.5."""
    timesteps = section_timesteps(300, [10, 15, 20])
    assert 149 in timesteps and 150 not in timesteps


def test_ddim_sections():
    assert spaced_timesteps(1000, None, "ddim25").tolist() == list(range(960, -1, -40))
    assert spaced_timesteps(1000, None, "ddim1000").tolist() == list(range(999, -1, -1))
    with pytest.raises(ValueError, match="no stride takes 999 of 1000"):
        spaced_timesteps(1000, None, "ddim999")


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((100, 5, "even"), ValueError, "spacing is 'even', expected 'linspace', 'leading'"),
        ((100, 5, 3), TypeError, "spacing is 3, expected a string"),
        ((100, 5, "ddim25"), ValueError, "steps is 5 beside spacing 'ddim25'"),
        ((100, None, "10,95"), ValueError, "section 1 is to give 95 timesteps, expected 1 to 50"),
    ],
)
def test_bad_spacings(arguments, error, message):
    with pytest.raises(error, match=message):
        spaced_timesteps(*arguments)


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_karras_sigmas(rho):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EulerDiscreteScheduler(1000, 0.00085, 0.012, "scaled_linear", use_karras_sigmas=True)
    known = (1 / LEVELS - 1).sqrt()
    grid = karras_grid(LEVELS, 15, rho=rho)
    sigma = (1 / grid.now - 1).sqrt()
    if rho == 7:  # the only rho that diffusers has, in float32
        scheduler.set_timesteps(15)
        torch.testing.assert_close(sigma.float(), scheduler.sigmas[:-1], rtol=1e-4, atol=0)
        torch.testing.assert_close(grid.timestep.float(), scheduler.timesteps, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(sigma[[0, -1]], known[[-1, 0]], rtol=1e-9, atol=0)
    even = sigma ** (1 / rho)
    torch.testing.assert_close(even.diff(), even.diff()[:1].expand(14), rtol=1e-9, atol=0)
    assert (grid.timestep.diff() < 0).all()
    assert abs(grid.timestep[0] - 999) < 1e-9
    assert abs(grid.timestep[-1]) < 1e-12


def test_log_snr_is_even_in_log_sigma():
    grid = log_snr_grid(LEVELS, 20)
    log_sigma = (1 / grid.now - 1).sqrt().log()
    torch.testing.assert_close(log_sigma.diff(), log_sigma.diff()[:1].expand(19), rtol=1e-9, atol=0)
    whole = grid.timestep.round().long()
    assert ((1 / LEVELS - 1).sqrt().log()[whole] - log_sigma).abs().max() < 0.1  # half a timestep, at low noise


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: karras_grid(LEVELS, 0), ValueError, "steps is 0"),
        (lambda: karras_grid(LEVELS, 5, rho=0), ValueError, "rho is 0"),
        (lambda: log_snr_grid(LEVELS.flip(0), 5), ValueError, "does not fall"),
        (lambda: karras_grid(torch.tensor([0.5, 0.0]), 5), ValueError, "reaches 0 or 1"),
    ],
)
def test_bad_sigma_grids(make, error, message):
    with pytest.raises(error, match=message):
        make()
