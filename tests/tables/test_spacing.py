"""Spacings: which timesteps a loop takes, and alphas_cumprod at each."""

import numpy as np
import pytest
import torch
from scipy import stats
from support.choices import for_many

from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.tables.beta_quantile import beta_quantile
from ddpm_ext.tables.spacing import section_timesteps, spaced_timesteps


@for_many(200)
def test_spaced_timesteps(choose):
    timesteps = choose.integer(1, 5000)
    steps = choose.integer(1, timesteps)
    for all_of_them in (None, timesteps):
        assert torch.equal(spaced_timesteps(timesteps, all_of_them), torch.arange(timesteps - 1, -1, -1))
    assert torch.equal(spaced_timesteps(timesteps, steps), spaced_timesteps(timesteps, steps, "trailing"))
    spaced = spaced_timesteps(timesteps, steps, "linspace")
    assert spaced.dtype == torch.int64 and spaced.shape == (steps,) and spaced[0] == timesteps - 1
    if steps > 1:
        assert spaced[-1] == 0
        gaps = -spaced.diff()
        assert gaps.min() >= 1  # descending and distinct
        assert (gaps - (timesteps - 1) / (steps - 1)).abs().max() <= 1  # even spacing, up to the rounding of both ends


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 333, 999, 1000])
def test_spacings_are_diffusers(spacing, steps):
    scheduler = pytest.importorskip("diffusers").DDIMScheduler(1000, timestep_spacing=spacing, steps_offset=0)
    scheduler.set_timesteps(steps)
    # With one step diffusers starts from timestep 0, where there is no noise to remove.
    if spacing == "linspace" and steps == 1:
        assert spaced_timesteps(1000, 1).tolist() == [999]
    else:
        assert spaced_timesteps(1000, steps, spacing).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 20, 50, 100, 333, 999, 1000])
def test_beta_and_simple(steps):
    """As ComfyUI has both: Lee et al. 2024 by scipy's quantiles, and k-diffusion's rounding. But where some of its
    timesteps are equal, ComfyUI takes fewer steps, while "beta" takes the next timesteps."""
    assert spaced_timesteps(1000, steps, "simple").tolist() == [999 - int(i * (1000 / steps)) for i in range(steps)]
    ideal = np.rint(stats.beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), 0.6, 0.6) * 999)
    beta = spaced_timesteps(1000, steps, "beta")
    if steps <= 100:
        assert beta.tolist() == ideal.tolist()
    assert beta[0] == 999 and beta[-1] >= 0 and (beta.diff() <= -1).all()


@pytest.mark.parametrize("steps", [1, 2, 10, 20, 50, 250, 1000])
def test_quadratic(steps):
    """tau_i = floor(c i^2) up to 0.8 T (Song et al. 2021, appendix), or the next timestep that is not taken yet."""
    spaced = spaced_timesteps(1000, steps, "quadratic").flip(0).double()
    exact = 800 * (torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)) ** 2
    assert (spaced.diff() >= 1).all()
    free = (spaced - exact).abs() < 1 + 1e-9
    assert (free | (spaced > exact)).all() and (free[1:] | (spaced.diff() == 1)).all() and free[0]
    assert spaced[-1] < 1000


@for_many(100)
def test_sections(choose):
    """Each section has its count of timesteps, evenly spaced, with both of its ends."""
    timesteps, number = choose.integer(10, 2000), choose.integer(1, 5)
    counts = [choose.integer(1, timesteps // number) for _ in range(number)]
    taken = section_timesteps(timesteps, counts).flip(0)
    assert torch.equal(taken, spaced_timesteps(timesteps, None, ",".join(map(str, counts))).flip(0))
    assert len(taken) == sum(counts) and (taken.diff() > 0).all()
    start = 0
    for i, count in enumerate(counts):
        length = timesteps // number + (i < timesteps % number)
        section = taken[(taken >= start) & (taken < start + length)]
        assert len(section) == count and section[0] == start and (count == 1 or section[-1] == start + length - 1)
        start += length
    assert 149 in section_timesteps(300, [10, 15, 20])  # where the position is 149.5, the stride's sum decides
    assert spaced_timesteps(1000, None, "ddim25").tolist() == list(range(960, -1, -40))


@for_many(100)
def test_quantiles_of_the_beta_distribution_are_scipys(choose):
    alpha, beta = (0.1 * choose.integer(1, 100) for _ in range(2))
    p = torch.linspace(0, 1, choose.integer(2, 40), dtype=torch.float64)
    expected = torch.from_numpy(stats.beta.ppf(p.numpy(), alpha, beta))
    torch.testing.assert_close(beta_quantile(p, alpha, beta), expected, rtol=0, atol=1e-11)


def test_names_as_people_type_them():
    names = {"euler_a": "euler_ancestral", "uni_pc": "unipc", "k_euler": "euler", "LMSDiscreteScheduler": "lms"}
    names |= {"sample_dpm_2": "dpm_2", "dpmpp_2m_sde_gpu": "dpmpp_2m_sde"}
    found = {(given, None): (name, None) for given, name in names.items()} | {("ddim", "ddim25"): ("ddim", "ddim25")}
    for given in (("DPM++ 2M Karras", None), ("dpmpp2m", "Karras"), ("dpmpp_2m_karras", "karras")):
        found[given] = "dpmpp_2m", "karras"
    found["DPM++ 3M SDE SGM Uniform", None] = "dpmpp_3m_sde", "sgm_uniform"
    for (sampler, spacing), expected in found.items():
        options = LoopOptions(sampler=sampler, spacing=spacing)
        assert (options.sampler, options.spacing) == expected
    with pytest.raises(ValueError, match="spacing is 'beta' with sampler 'Euler Karras', expected 'karras' or None"):
        LoopOptions(sampler="Euler Karras", spacing="beta")
    with pytest.raises(ValueError, match=r"^sampler is 'dpmpp_4m', expected a name such as ('\w+', ){2}'\w+'$"):
        LoopOptions(sampler="dpmpp_4m")
