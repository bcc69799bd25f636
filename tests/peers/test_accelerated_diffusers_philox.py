"""Accelerated diffusers schedulers with noise="philox": which noise they add, and that no other noise is drawn."""

import pytest
import torch

pytest.importorskip("diffusers")

from support.accelerated_diffusers import loop, make, model, normal, seeded

from ddpm_ext import GaussianDiffusion, Philox, randn
from ddpm_ext.integrations import accelerate

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")

SHAPE = (5, 3, 4, 6)
SEED = 11
STEPS = 10
NOISY = [
    ("DDPM", {}, {}),
    ("DDPM", {"variance_type": "learned_range"}, {}),
    ("DDPM", {"thresholding": True}, {}),
    ("DDIM", {}, {"eta": 1.0}),
    ("DDIM", {}, {"eta": 0.3, "use_clipped_model_output": True}),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("EulerAncestralDiscrete", {}, {}),
]
QUIET = [("DDIM", {}, {}), ("DDIMInverse", {}, {}), ("DPMSolverMultistep", {}, {}), ("EulerDiscrete", {}, {})]
IDS = [f"{name}{i}" for i, (name, _, _) in enumerate([*NOISY, *QUIET])]

noisy = pytest.mark.parametrize("name, config, options", NOISY, ids=IDS[: len(NOISY)])
each = pytest.mark.parametrize("name, config, options", NOISY + QUIET, ids=IDS)


def ours(name, config, seed=SEED, sample_ids=0, steps=STEPS):
    scheduler = accelerate(make(name, **config), noise="philox", seed=seed, sample_ids=sample_ids)
    scheduler.set_timesteps(steps)
    return scheduler


def channels_of(config):
    return SHAPE[1] * (2 if "learned" in config.get("variance_type", "") else 1)


def run(scheduler, config, options, rows=slice(None), dtype=torch.float32):
    x = (normal(1, *SHAPE)[rows] * scheduler.init_noise_sigma).to(dtype)
    return loop(scheduler, x, channels_of(config), **options)


@each
def test_no_generator_is_touched(name, config, options):
    scheduler, generator = ours(name, config), seeded(1)
    torch.manual_seed(3)
    before, default = generator.get_state(), torch.get_rng_state()
    given = {} if name == "DDIMInverse" else {"generator": generator}
    first = run(scheduler, config, {**options, **given})
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), default)
    assert not scheduler.accelerated.fallbacks
    again = run(ours(name, config), config, options)
    assert torch.equal(first, again)


@noisy
def test_another_seed_or_id_is_another_image(name, config, options):
    found = run(ours(name, config), config, options)
    assert not torch.allclose(run(ours(name, config, seed=SEED + 1), config, options), found, atol=1e-2)
    shifted = run(ours(name, config, sample_ids=1), config, options)
    assert not torch.allclose(shifted, found, atol=1e-2)


@each
@pytest.mark.parametrize("ids", [0, 2**40, torch.tensor([7, 3, 3, 2**55, 0])], ids=["0", "2^40", "tensor"])
def test_images_do_not_depend_on_the_batch(name, config, options, ids):
    """Nor on the samples' order in it."""
    whole = run(ours(name, config, sample_ids=ids), config, options)
    for rows in ([0, 1], [2], [3, 4], [4, 2, 0]):
        part = ids[rows] if isinstance(ids, torch.Tensor) else torch.tensor(rows) + ids
        found = run(ours(name, config, sample_ids=part), config, options, rows)
        assert torch.equal(found, whole[rows])
    if not isinstance(ids, torch.Tensor):  # counting up from a first one
        assert torch.equal(run(ours(name, config, sample_ids=ids + 3), config, options, slice(3, 5)), whole[3:5])


@noisy
def test_the_noise_is_the_contracts(name, config, options):
    """It is stream 0, with the timestep as its draw, in float32 for samples of any dtype."""
    for dtype in (torch.float32, torch.float16):
        scheduler, still = ours(name, config), ours(name, config)
        still.accelerated.rng = Philox(SEED + 1)
        t = scheduler.timesteps[4]
        x = torch.zeros(SHAPE, dtype=dtype)
        m = torch.zeros(SHAPE[0], channels_of(config), *SHAPE[2:], dtype=dtype)
        found = []
        for s in (scheduler, still):
            s.scale_model_input(x, t)
            found.append(s.step(m, t, x, **options)[0].float())
        for one, seed in zip(found, (SEED, SEED + 1), strict=True):
            z = randn(SHAPE, Philox(seed), draw=int(t))
            deviation = (one * z).sum() / (z * z).sum()
            assert deviation > 0.05
            torch.testing.assert_close(one, deviation * z, rtol=2e-3 if dtype == torch.float16 else 2e-6, atol=1e-4)


def test_between_timesteps_a_steps_draw_is_its_row():
    scheduler = ours("EulerAncestralDiscrete", {}, steps=7)
    assert any(t % 1 for t in scheduler.timesteps.tolist())
    x = torch.zeros(SHAPE)
    for row, t in enumerate(scheduler.timesteps[:-1]):
        scheduler.scale_model_input(x, t)
        found, z = scheduler.step(x, t, x)[0], randn(SHAPE, Philox(SEED), draw=row)
        torch.testing.assert_close(found, (found * z).sum() / (z * z).sum() * z, rtol=2e-6, atol=1e-5)


def test_settings_can_be_set_anew():
    scheduler = ours("DDPM", {})
    first = run(scheduler, {}, {})
    scheduler.accelerated.rng = Philox(SEED + 1, 4)
    assert torch.equal(run(scheduler, {}, {}), run(ours("DDPM", {}, SEED + 1, 4), {}, {}))
    scheduler.accelerated.rng = Philox(SEED)
    assert torch.equal(run(scheduler, {}, {}), first)


def test_variance_noise_comes_first():
    scheduler, x, m, z = ours("DDIM", {}), *(normal(i, *SHAPE) for i in range(3))
    plain = make("DDIM")
    plain.set_timesteps(STEPS)
    found = scheduler.step(m, 500, x, eta=1.0, variance_noise=z).prev_sample
    expected = plain.step(m, 500, x, eta=1.0, variance_noise=z).prev_sample
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_memory_layout_and_dtype_of_a_step():
    """An element's noise is the same in any layout; 16-bit samples get it rounded."""
    (first, second, third), (x, m) = [ours("DDPM", {}) for _ in range(3)], (normal(i, *SHAPE) for i in range(2))
    found = first.step(m, 500, x).prev_sample
    last = {"memory_format": torch.channels_last}
    assert torch.equal(second.step(m.contiguous(**last), 500, x.contiguous(**last)).prev_sample, found)
    half = third.step(m.bfloat16(), 500, x.bfloat16()).prev_sample
    torch.testing.assert_close(half.float(), found, rtol=0, atol=0.05)


# ------------------------------------------------------------------------- the same as a loop of GaussianDiffusion

SAME = 5e-6  # of the largest: float32 alphas_cumprod there, float64 here. Measured: 6.7e-7


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=SAME * max(1.0, expected.abs().max().item()))


def ours_and_loop(name, config, options, sampler, **loop_options):
    scheduler = ours(name, {"timestep_spacing": "trailing", **config})
    gd = GaussianDiffusion(1000, scheduler.betas)
    found = gd.p_sample_loop(
        lambda x, t: model(x, t.reshape(-1, 1, 1, 1)),
        SHAPE,
        sampler=sampler,
        steps=STEPS,
        spacing="trailing",
        rng=Philox(SEED),
        record="last",
        progress=False,
        **loop_options,
    )
    x = randn(SHAPE, scheduler.accelerated.rng, stream=1)
    if name == "EulerAncestralDiscrete":
        x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    return loop(scheduler, x, **options), found


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_ddpm_of_the_same_seed(schedule):
    same(*ours_and_loop("DDPM", {"beta_schedule": schedule}, {}, "ddpm"))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_of_the_same_seed(eta):
    same(*ours_and_loop("DDIM", {}, {"eta": eta}, "ddim", eta=eta))


def test_dpm_solver_of_the_same_seed():
    """diffusers counts its trailing timesteps from the schedule's end, so they are the same."""
    config = {"algorithm_type": "sde-dpmsolver++"}
    pair = ours_and_loop("DPMSolverMultistep", config, {}, "dpmpp_2m_sde", clip_denoised=False)
    same(*pair)


def test_euler_ancestral_of_the_same_seed():
    """The samples of the one are scaled by sigma; both end at clean data."""
    config = {"beta_schedule": "scaled_linear"}
    pair = ours_and_loop("EulerAncestralDiscrete", config, {}, "euler_ancestral", clip_denoised=False)
    same(*pair)
