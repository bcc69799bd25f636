"""Accelerated diffusers schedulers with noise="philox": which noise they add, that no other is drawn, and that no two
loops share noise."""

import pytest
import torch

pytest.importorskip("diffusers")

from support.accelerated_diffusers import loop, make, model, normal, seeded
from support.noise_of_loops import parts, repeats, unrelated

from ddpm_ext import GaussianDiffusion, Philox, randn
from ddpm_ext.integrations import accelerate

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SHAPE = (10, 3, 8, 9)
SEED = 11
NOISY = [
    ("DDPM", {"variance_type": "learned_range"}, {}),
    ("DDPM", {"thresholding": True}, {}),
    ("DDIM", {}, {"eta": 0.3, "use_clipped_model_output": True}),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("EulerAncestralDiscrete", {}, {}),
    ("LCM", {}, {}),
]
noisy = pytest.mark.parametrize("name, config, options", NOISY, ids=[f"{n}{i}" for i, (n, _, _) in enumerate(NOISY)])
STEPWISE = [("DDPM", {}), ("DDIM", {"eta": 1.0})]


def made(name, config, seed=SEED, ids=0, steps=10):
    scheduler = accelerate(make(name, **config), noise="philox", seed=seed, sample_ids=ids)
    scheduler.set_timesteps(steps)
    return scheduler


def channels_of(config):
    return SHAPE[1] * (2 if "learned" in config.get("variance_type", "") else 1)


def run(scheduler, config, options, rows=slice(None)):
    """A loop of rows of the same samples."""
    scheduler.set_timesteps(10)
    return loop(scheduler, normal(1, *SHAPE)[rows] * scheduler.init_noise_sigma, channels_of(config), **options)


def steps(scheduler, x, timesteps, channels=SHAPE[1], **options):
    """Steps of a model without a mean, so that samples have no more in common than their noise."""
    for t in timesteps:
        m = model(scheduler.scale_model_input(x, t), t, channels) * 0.3
        x = scheduler.step(m, t, x, **options).prev_sample
    return x


def from_zeros(scheduler, batch=SHAPE[0], config=None, count=10, **options):
    scheduler.set_timesteps(count)
    x = torch.zeros(batch, *SHAPE[1:])
    return steps(scheduler, x, scheduler.timesteps, channels_of(config or {}), **options)


# ------------------------------------------------------------------------------------------------- which noise it is


@noisy
def test_images_belong_to_their_ids(name, config, options):
    """They may be large or come twice; another seed or id is another image. No generator is touched, even a given
    one."""
    scheduler, generator = made(name, config), seeded(1)
    before, default = generator.get_state(), torch.get_rng_state()
    whole = run(scheduler, config, {**options, "generator": generator})
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), default)
    assert not scheduler.accelerated.fallbacks
    ids = torch.tensor([7, 3, 3, 2**55, 0, 1, 2, 4, 5, 6])
    expected = run(made(name, config, ids=ids), config, options)
    for rows in ([0, 1], [2], [4, 2, 0]):
        assert torch.equal(run(made(name, config, ids=ids[rows]), config, options, rows), expected[rows])
    assert torch.equal(run(made(name, config, ids=3), config, options, slice(3, 5)), whole[3:5])
    for other in (made(name, config, SEED + 1), made(name, config, ids=10)):
        assert not torch.allclose(run(other, config, options), whole, atol=1e-2)


@pytest.mark.parametrize("start", [0, 3])
def test_between_timesteps_a_steps_draw_is_its_row(start):
    scheduler = made("EulerAncestralDiscrete", {}, steps=7)
    assert any(t % 1 for t in scheduler.timesteps.tolist())
    x = torch.zeros(SHAPE)
    for row, t in list(enumerate(scheduler.timesteps[:-1]))[start:]:
        scheduler.scale_model_input(x, t)
        found, z = scheduler.step(x, t, x)[0], randn(SHAPE, Philox(SEED), draw=row)
        torch.testing.assert_close(found, (found * z).sum() / (z * z).sum() * z, rtol=2e-6, atol=1e-5)


def test_variance_noise_comes_first():
    plain, (x, m, z) = make("DDIM"), (normal(i, *SHAPE) for i in range(3))
    plain.set_timesteps(10)
    found, expected = (s.step(m, 500, x, eta=1.0, variance_noise=z).prev_sample for s in (made("DDIM", {}), plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name, config, options, sampler, of_loop",
    [
        ("DDPM", {}, {}, "ddpm", {}),
        ("DDIM", {}, {"eta": 0.5}, "ddim", {"eta": 0.5}),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, {}, "dpmpp_2m_sde", {"clip_denoised": False}),
        ("EulerAncestralDiscrete", {"beta_schedule": "scaled_linear"}, {}, "euler_ancestral", {"clip_denoised": False}),
    ],
)
def test_a_loop_of_gaussian_diffusion_with_the_same_seed(name, config, options, sampler, of_loop):
    """To the rounding of float32 alphas_cumprod there and float64 here: 6.7e-7 of the largest was measured."""
    scheduler = made(name, {"timestep_spacing": "trailing", **config})
    of_loop = of_loop | {"sampler": sampler, "steps": 10, "spacing": "trailing", "rng": Philox(SEED)}
    expected = GaussianDiffusion(1000, scheduler.betas).p_sample_loop(
        lambda x, t: model(x, t.reshape(-1, 1, 1, 1)), SHAPE, record="last", progress=False, **of_loop
    )
    x = randn(SHAPE, scheduler.accelerated.rng, stream=1)
    if name == "EulerAncestralDiscrete":  # whose samples are scaled by sigma; both end at clean data
        x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    found = loop(scheduler, x, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 * max(1.0, expected.abs().max().item()))


# ------------------------------------------------------------------------------------------------ noise of loops


@noisy
def test_loops_share_no_noise(name, config, options):
    def make_one(seed):
        return accelerate(make(name, **config), noise="philox", seed=seed)

    repeats(make_one, lambda scheduler: from_zeros(scheduler, config=config, **options))


@noisy
def test_parts_of_a_batch(name, config, options):
    """Two loops of 5 are one of 10: the second has the next ids, whatever set_timesteps was called in between. So has a
    loop of a new object with these ids."""

    def of(scheduler, batch):
        for count in (3, 5):
            scheduler.set_timesteps(count)
        return from_zeros(scheduler, batch, config, **options)

    parts(lambda sample_ids=0: made(name, config, ids=sample_ids), of)


@pytest.mark.parametrize("name, options", STEPWISE)
@pytest.mark.parametrize("start", [0, 5])
def test_loops_over_steps_alone(name, options, start):
    """set_timesteps is called once; each loop begins where the timesteps go back."""

    def by_hand(scheduler, batch=SHAPE[0]):
        return steps(scheduler, torch.zeros(batch, *SHAPE[1:]), scheduler.timesteps[start:], **options)

    again, drawn, parts = made(name, {}), made(name, {}, seed=None), made(name, {})
    found = [by_hand(again) for _ in range(3)]
    unrelated(found)
    unrelated([by_hand(drawn) for _ in range(3)])
    assert torch.equal(torch.cat([by_hand(parts, 4), by_hand(parts, 6)]), found[0])


def test_single_steps_and_loops_by_their_index():
    """A loop without set_timesteps, one that goes back to its first index, and one step again and again."""
    short = accelerate(make("DDPM", num_train_timesteps=20), noise="philox", seed=7)
    by_index, one, x, found = made("EulerAncestralDiscrete", {}), made("DDPM", {}), torch.zeros(SHAPE), []
    unrelated([steps(short, x, range(19, -1, -1)) for _ in range(3)])
    for _ in range(3):
        by_index._step_index = None
        found.append(steps(by_index, x, by_index.timesteps))
    unrelated(found)
    unrelated([one.step(x, 500, x).prev_sample for _ in range(3)])


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("name, options", STEPWISE)
def test_a_batch_step_by_step_in_parts(name, options, seed):
    """Each timestep is taken for one part, then for the next, as for a panorama's views: one loop, whose noise is that
    of the whole batch."""
    torch.manual_seed(0)
    scheduler = made(name, {}, seed)
    x = torch.zeros(SHAPE)
    for t in scheduler.timesteps:
        x = torch.cat([steps(scheduler, part, [t], **options) for part in x.split([4, 4, 2])])
    torch.manual_seed(0)
    whole = made(name, {}, seed)
    assert torch.equal(x, from_zeros(whole, **options))
    if seed is not None:
        assert torch.equal(from_zeros(scheduler, 3, **options), from_zeros(whole, 3, **options))
