"""The peculiarities of diffusers' schedulers, one by one: variances, noise, thresholds, ends of a schedule."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers.utils import torch_utils
from support.accelerated_diffusers import compare, equal, launches, make, normal, seeded

from ddpm_ext.integrations import accelerate
from ddpm_ext.integrations.diffusers import scheduler as sched

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")

SHAPE = (2, 3, 4, 5)
X, M, Z = (normal(i, *SHAPE) for i in range(3))
NOTHING = torch.zeros(SHAPE)


def ours(name, steps=10, **config):
    scheduler = accelerate(make(name, **config))
    if isinstance(steps, int):
        scheduler.set_timesteps(steps)
    elif steps is not None:
        scheduler.set_timesteps(timesteps=steps)
    return scheduler


def deviation(scheduler, t, v=None):
    """The factor of the noise in a step from zeros with an output of zeros."""
    m = NOTHING if v is None else torch.cat([NOTHING, torch.full(SHAPE, v)], 1)
    with launches() as called:
        found = scheduler.step(m, t, NOTHING, generator=seeded(1)).prev_sample
    assert called
    z = torch.randn(SHAPE, generator=seeded(1))
    torch.testing.assert_close(found, found.flatten()[0] / z.flatten()[0] * z, rtol=1e-5, atol=0)
    return (found.flatten()[0] / z.flatten()[0]).item()


def variances(scheduler, t):
    """Those of fixed_small and fixed_large."""
    return [scheduler._get_variance(t, variance_type=name).item() for name in ("fixed_small", "fixed_large")]


# -------------------------------------------------------------------------------------------------- DDPM's variances


def test_fixed_small_is_at_least_1e_20():
    scheduler = ours("DDPM", [500, 20])
    assert variances(scheduler, 20)[0] == pytest.approx(1e-20)
    assert deviation(scheduler, 20) == pytest.approx(1e-10, rel=1e-5)
    assert deviation(scheduler, 500) == pytest.approx(variances(scheduler, 500)[0] ** 0.5, rel=1e-5)


def test_fixed_small_log_is_a_standard_deviation():
    small, log = ours("DDPM"), ours("DDPM", variance_type="fixed_small_log")
    assert log._get_variance(400).item() == pytest.approx(small._get_variance(400).item() ** 0.5)
    assert deviation(log, 400) == deviation(small, 400)


def test_fixed_large_is_beta():
    scheduler = ours("DDPM", variance_type="fixed_large")
    beta = 1 - scheduler.alphas_cumprod[400] / scheduler.alphas_cumprod[300]
    assert deviation(scheduler, 400) == pytest.approx(beta.sqrt().item(), rel=1e-6)


def test_fixed_large_log_is_no_number_and_runs_the_own_code():
    """diffusers takes the square root of a logarithm."""
    scheduler = ours("DDPM", variance_type="fixed_large_log")
    with pytest.warns(UserWarning, match="step runs the own code of diffusers: variance_type is 'fixed_large_log'"):
        found = scheduler.step(M, 400, X).prev_sample
    assert found.isnan().all()
    assert scheduler.accelerated.fallbacks == {"step": "variance_type is 'fixed_large_log'"}


def test_learned_is_a_variance():
    """It isn't a logarithm, as in other libraries."""
    scheduler = ours("DDPM", variance_type="learned")
    assert deviation(scheduler, 400, 0.09) == pytest.approx(0.3, rel=1e-6)
    assert deviation(scheduler, 400, 1e-9) == pytest.approx(1e-9**0.5, rel=1e-6)


def test_learned_range_is_between_logarithms():
    scheduler = ours("DDPM", variance_type="learned_range")
    small, large = variances(scheduler, 400)
    for v, power in ((-1, 0), (1, 1), (0, 0.5), (0.4, 0.7), (3.0, 2.0)):
        expected = (small ** (1 - power) * large**power) ** 0.5
        assert deviation(scheduler, 400, v) == pytest.approx(expected, rel=1e-5)


def test_a_variance_that_is_set_beside_the_config_runs_the_own_code():
    """diffusers reads the attribute in one place and the config in another."""
    scheduler = ours("DDPM")
    scheduler.variance_type = "fixed_small_log"
    other = make("DDPM")
    other.set_timesteps(10)
    other.variance_type = "fixed_small_log"
    with pytest.warns(UserWarning, match="variance_type is not its config's"):
        found = scheduler.step(M, 400, X, generator=seeded(1))
    equal(found.values(), other.step(M, 400, X, generator=seeded(1)).values())


# ---------------------------------------------------------------------------------------------------- when noise is


@pytest.mark.parametrize("steps", [None, 1, 10, 1000])
def test_ddpm_draws_no_noise_at_0(steps):
    scheduler, generator = ours("DDPM", steps), seeded(1)
    before = generator.get_state()
    scheduler.step(M, 0, X, generator=generator)
    assert torch.equal(generator.get_state(), before)
    if steps != 1:
        scheduler.step(M, int(scheduler.timesteps[-2]), X, generator=generator)
        assert not torch.equal(generator.get_state(), before)


def test_ddpm_draws_noise_at_a_last_timestep_above_0():
    scheduler, generator = ours("DDPM", [700, 30]), seeded(1)
    before = generator.get_state()
    scheduler.step(M, 30, X, generator=generator)
    assert not torch.equal(generator.get_state(), before)


def test_ddim_draws_no_noise_with_eta_0():
    scheduler, generator = ours("DDIM"), seeded(1)
    before = generator.get_state()
    torch.manual_seed(1)
    default = torch.get_rng_state()
    scheduler.step(M, 400, X, generator=generator)
    scheduler.step(M, 400, X, eta=0.0, variance_noise=Z, generator=generator)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), default)
    scheduler.step(M, 400, X, eta=1e-3, generator=generator)
    assert not torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("name, options", [("DDIM", {"eta": 1.0}), ("DPMSolverMultistep", {})])
def test_variance_noise_is_used_as_it_is(name, options):
    config = {"algorithm_type": "sde-dpmsolver++"} if name == "DPMSolverMultistep" else {}
    found = [ours(name, **config).step(M, 400, X, variance_noise=z, **options).prev_sample for z in (Z, 0 * Z)]
    ratio = (found[0] - found[1]) / Z
    torch.testing.assert_close(ratio, ratio.median().expand(SHAPE), rtol=1e-3, atol=1e-5)
    assert ratio.median() > 0.1


def test_ddim_with_generator_and_variance_noise_is_refused():
    with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
        ours("DDIM").step(M, 400, X, eta=1.0, variance_noise=Z, generator=seeded(1))


def test_euler_ancestral_draws_noise_in_its_last_step_too():
    scheduler, generator = ours("EulerAncestralDiscrete"), seeded(1)
    t = scheduler.timesteps[-1]
    scheduler.scale_model_input(X, t)
    before = generator.get_state()
    found = scheduler.step(M, t, X, generator=generator)
    assert not torch.equal(generator.get_state(), before)
    torch.testing.assert_close(*found.values(), rtol=0, atol=1e-6)  # multiplied by 0


# --------------------------------------------------------------------------------------- from where to where


@pytest.mark.parametrize("timesteps", [[999, 500, 3], [77], [999, 998, 1, 0], [500, -5]])
def test_ddpm_goes_to_the_next_custom_timestep(timesteps):
    """Also from the last timestep to clean data, and from the one before a negative one."""
    plain = make("DDPM", prediction_type="v_prediction")
    plain.set_timesteps(timesteps=timesteps)
    for t in timesteps:
        if t >= 0:
            _, fused = compare("DDPM", plain, M, t, X)
            assert fused


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_ddpm_far_from_its_next_timestep(schedule):
    """There 1 - beta has no digits left, so alpha is read from the ratio itself."""
    plain = make("DDPM", beta_schedule=schedule, prediction_type="v_prediction")
    plain.set_timesteps(timesteps=[999, 10])
    _, fused = compare("DDPM", plain, M, 999, 100 * X)
    assert fused


@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_previous_timestep_by_spacing(name, spacing):
    plain = make(name, timestep_spacing=spacing, steps_offset=1)
    plain.set_timesteps(7)
    for t in plain.timesteps:
        _, fused = compare(name, plain, M, t, X)
        assert fused


def test_ddpm_without_set_timesteps_goes_down_by_one():
    scheduler = make("DDPM")
    for t in (999, 1, 0):
        assert compare("DDPM", scheduler, M, t, X)[1]


def test_ddpm_off_its_timesteps_is_refused():
    scheduler = ours("DDPM")
    for t in (401, 1000, -1):
        with pytest.raises(IndexError):
            scheduler.step(M, t, X)


@pytest.mark.parametrize("name", ["DDIM", "DDIMInverse"])
def test_set_alpha_to_one(name):
    found = []
    for given in (True, False):
        plain = make(name, set_alpha_to_one=given, clip_sample=False)
        plain.set_timesteps(10)
        t = plain.timesteps[-1 if name == "DDIM" else 0]
        assert compare(name, plain, M, t, X)[1]
        scheduler = accelerate(plain)
        found.append(scheduler.step(M, t, X))
    prev, x0 = found[0].values()
    if name == "DDIM":
        torch.testing.assert_close(prev, x0, rtol=0, atol=0)
    assert not torch.allclose(found[0].prev_sample, found[1].prev_sample, atol=1e-3)


def test_final_alpha_cumprod_as_a_number():
    scheduler, plain = ours("DDIM"), make("DDIM")
    plain.set_timesteps(10)
    plain.final_alpha_cumprod = scheduler.final_alpha_cumprod = 0.99995
    found = scheduler.step(M, 0, X)
    assert not scheduler.accelerated.fallbacks
    for mine, theirs in zip(found.values(), plain.step(M, 0, X).values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_use_clipped_model_output():
    plain = make("DDIM")
    plain.set_timesteps(10)
    found = []
    for given in (True, False):
        assert compare("DDIM", plain, 3 * M, 400, X, use_clipped_model_output=given)[1]
        found.append(accelerate(plain).step(3 * M, 400, X, use_clipped_model_output=given).prev_sample)
    assert not torch.allclose(*found, atol=1e-2)


@pytest.mark.parametrize("eta", [1.2, -0.5, float("nan")])
def test_ddim_eta_out_of_range_runs_the_own_code(eta):
    scheduler, plain = ours("DDIM"), make("DDIM")
    plain.set_timesteps(10)
    with pytest.warns(UserWarning, match=f"eta is {eta}"):
        found = scheduler.step(M, 400, X, eta=eta, generator=seeded(1))
    equal(found.values(), plain.step(M, 400, X, eta=eta, generator=seeded(1)).values())


# ------------------------------------------------------------------------------------------------ thresholds, clips


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "DPMSolverMultistep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_threshold_is_a_samples_own(name, dtype):
    """It is a quantile in float32, at least 1 and at most sample_max_value, of each sample by itself."""
    size = torch.tensor([0.1, 1.0, 4.0, 40.0]).reshape(4, 1, 1, 1)
    x, m = ((size * normal(i, 4, 3, 8, 8)).to(dtype) for i in range(2))
    config = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 20.0}
    plain = make(name, **config)
    plain.set_timesteps(10)
    t = int(plain.timesteps[4])
    assert compare(name, plain, m, t, x)[1]
    whole = accelerate(make(name, **config))
    whole.set_timesteps(10)
    together = whole.step(m, t, x, generator=seeded(1))[0]
    for i in range(4):
        alone = accelerate(make(name, **config))
        alone.set_timesteps(10)
        generators = [seeded(1)] if name != "DDPM" else None
        torch.manual_seed(0)
        found = alone.step(m[i : i + 1], t, x[i : i + 1], generator=generators)[0]
        if name != "DDPM":  # whose noise is another one alone
            assert torch.equal(found, together[i : i + 1])


@pytest.mark.parametrize("ratio, most", [(0.5, 0.7), (0.9, float("nan")), (0.0, 1.0)])
def test_threshold_out_of_range_runs_the_own_code(ratio, most):
    config = {"thresholding": True, "dynamic_thresholding_ratio": ratio, "sample_max_value": most}
    scheduler, plain = ours("DDIM", **config), make("DDIM", **config)
    plain.set_timesteps(10)
    with pytest.warns(UserWarning, match="dynamic_thresholding_ratio is"):
        found = scheduler.step(M, 400, X)
    equal(found.values(), plain.step(M, 400, X).values())


def test_a_negative_clip_range_runs_the_own_code():
    scheduler, plain = ours("DDIM", clip_sample_range=-0.5), make("DDIM", clip_sample_range=-0.5)
    plain.set_timesteps(10)
    with pytest.warns(UserWarning, match="clip_sample_range is -0.5"):
        found = scheduler.step(M, 400, X)
    equal(found.values(), plain.step(M, 400, X).values())


def test_numbers_that_are_none_stay_so():
    x = X.clone()
    x[0, 0, 0, 0] = torch.nan
    for name in ("DDPM", "DDIM", "DDIMInverse", "DPMSolverMultistep"):
        plain = make(name)
        plain.set_timesteps(10)
        assert compare(name, plain, M, int(plain.timesteps[3]), x)[1]


# ---------------------------------------------------------------------------------------------------- zero terminal


@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
def test_epsilon_from_noise_alone(name):
    """With a clip, x0 is the sign of x - m; without one it is infinite, and diffusers' own code runs."""
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler, free = ours(name, **config), ours(name, **config, clip_sample=False)
    assert scheduler.alphas_cumprod[999] == 0
    with launches() as called:
        found = scheduler.step(M, 999, X, generator=seeded(1))
    assert called
    assert torch.equal(found.pred_original_sample, (X - M).sign())
    assert not scheduler.step(X, 999, X).pred_original_sample.any()  # 0 / 0 there
    plain = make(name, **config, clip_sample=False)
    plain.set_timesteps(10)
    with pytest.warns(UserWarning, match="alphas_cumprod is 0 or 1 there"):
        found = free.step(M, 999, X, generator=seeded(1))
    equal(found.values(), plain.step(M, 999, X, generator=seeded(1)).values())
    with launches() as called:  # the others are fused
        free.step(M, 899, X, generator=seeded(1))
    assert called


def test_a_step_to_more_noise_is_no_number_and_runs_the_own_code():
    """Its variance is negative. With eta 0, the root of it is multiplied by 0, which is NaN."""
    for name, timesteps in (("DDPM", [100, 500, 900]), ("DDIM", None)):
        plain = make(name)
        plain.set_timesteps(10)
        if name == "DDPM":
            plain.timesteps = torch.tensor(timesteps)
        else:
            plain.final_alpha_cumprod = torch.tensor(0.9)
        accelerated, fused = compare(name, plain, M, 100 if name == "DDPM" else 0, X)
        assert not fused
        assert accelerated.accelerated.fallbacks


@pytest.mark.parametrize("name", ["DDIM", "DDIMInverse"])
def test_no_step_has_a_fused_form(name):
    """Each step begins or ends at clean data, where the noise would have to follow from the model's output."""
    config = {"prediction_type": "sample"}
    plain = make(name, **config)
    plain.set_timesteps(1)
    if name == "DDIM":
        plain.alphas_cumprod = torch.ones(1000)
    t = np.int64(5)
    assert not compare(name, plain, M, t, X)[1]


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "EulerDiscrete", "EulerAncestralDiscrete"])
def test_zero_terminal_snr_in_sigmas(name):
    plain = make(name, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    plain.set_timesteps(10)
    assert plain.sigmas[0].item() == pytest.approx(4096, rel=1e-6)
    plain._step_index, plain.is_scale_input_called = 0, True
    assert compare(name, plain, M, plain.timesteps[0], X * (1 if name == "DPMSolverMultistep" else 4096))[1]


def test_the_next_sample_lies_where_its_noise_was_drawn(monkeypatch):
    """Unless somebody has replaced the function that draws, and may keep its results."""
    scheduler, drawn, draw = ours("DDPM"), [], torch_utils.randn_tensor
    monkeypatch.setattr(sched, "imported", lambda *_: lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
    t = scheduler.timesteps[3]
    assert scheduler.step(M, t, X, return_dict=False)[0].data_ptr() == drawn[0].data_ptr()
    monkeypatch.setattr(torch, "randn", lambda *_, **__: Z)
    before = Z.clone()
    assert scheduler.step(M, t, X, return_dict=False)[0].data_ptr() != Z.data_ptr()
    assert torch.equal(Z, before)
