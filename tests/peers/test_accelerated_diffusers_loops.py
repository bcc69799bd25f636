"""Whole loops with accelerated diffusers schedulers beside those with diffusers' own, from the same generators."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")

from support.accelerated_diffusers import Elsewhere, launches, loop, make, model, normal, seeded

from ddpm_ext.integrations import accelerate

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")

SHAPE = (3, 2, 5, 6)
KARRAS = {"use_karras_sigmas": True}
CONFIGS = [
    ("DDPM", 1000, {}),
    ("DDPM", 20, {"variance_type": "fixed_large", "beta_schedule": "squaredcos_cap_v2"}),
    ("DDPM", 20, {"thresholding": True, "sample_max_value": 3.0, "prediction_type": "v_prediction"}),
    ("DDPM", 25, {"variance_type": "learned_range", "timestep_spacing": "trailing"}),
    ("DDPM", 25, {"variance_type": "learned", "clip_sample": False, "prediction_type": "sample"}),
    ("DDPM", 10, {"variance_type": "fixed_small_log", "steps_offset": 1}),
    ("DDPM", [999, 700, 320, 77, 20], {"clip_sample_range": 2.0}),
    ("DDIM", 50, {}),
    ("DDIM", 20, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    (
        "DDIM",
        10,
        {"thresholding": True, "set_alpha_to_one": False, "steps_offset": 1, "beta_schedule": "scaled_linear"},
    ),
    ("DDIMInverse", 20, {"clip_sample": False}),
    ("DDIMInverse", 50, {"set_alpha_to_one": False, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ("DPMSolverMultistep", 10, {}),
    ("DPMSolverMultistep", 20, {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", **KARRAS}),
    ("DPMSolverMultistep", 12, {"algorithm_type": "sde-dpmsolver++", "euler_at_final": True}),
    ("DPMSolverMultistep", 8, {"final_sigmas_type": "sigma_min", "lower_order_final": False, "thresholding": True}),
    ("DPMSolverMultistep", [900, 500, 444, 20], {"prediction_type": "sample", "solver_order": 1}),
    ("DPMSolverMultistep", 9, {"use_lu_lambdas": True, "prediction_type": "v_prediction"}),
    ("EulerDiscrete", 30, {"beta_schedule": "scaled_linear"}),
    ("EulerDiscrete", 10, {"timestep_spacing": "trailing", "prediction_type": "v_prediction", **KARRAS}),
    ("EulerDiscrete", 10, {"interpolation_type": "log_linear", "rescale_betas_zero_snr": True}),
    ("EulerDiscrete", [800, 310, 100], {"prediction_type": "sample", "final_sigmas_type": "sigma_min"}),
    ("EulerDiscrete", 10, {"timestep_type": "continuous", "prediction_type": "v_prediction", **KARRAS}),
    ("EulerAncestralDiscrete", 30, {"beta_schedule": "scaled_linear"}),
    ("EulerAncestralDiscrete", 12, {"timestep_spacing": "leading", "prediction_type": "v_prediction"}),
]
configs = pytest.mark.parametrize("name, steps, config", CONFIGS, ids=[f"{c[0]}{i}" for i, c in enumerate(CONFIGS)])
IMAGES = [
    ("DPMSolverMultistep", {}),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    ("EulerDiscrete", {}),
    ("EulerAncestralDiscrete", {}),
]


def prepared(name, steps, config):
    scheduler = make(name, **config)
    if isinstance(steps, int):
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=steps)
    return scheduler


def channels_of(config):
    return SHAPE[1] * (2 if "learned" in config.get("variance_type", "") else 1)


def generators(name, several):
    """The generator argument of step, and the generators whose states are compared."""
    if name == "DDIMInverse":
        return {}, []
    made = [seeded(i) for i in range(SHAPE[0] if several else 1)]
    return {"generator": made if several else made[0]}, made


def close(found, expected):
    # relative to the largest: with sigmas, samples start as large as those
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("several", [False, True], ids=["generator", "generators"])
@configs
def test_loop(name, steps, config, several):
    plain = prepared(name, steps, config)
    ours = accelerate(plain)
    x = normal(3, *SHAPE) * plain.init_noise_sigma
    given, made = generators(name, several)
    expected = loop(plain, x, channels_of(config), **given)
    states = [generator.get_state() for generator in made]
    given, made = generators(name, several)
    with launches() as called:
        found = loop(ours, x, channels_of(config), **given)
    close(found, expected)
    assert all(torch.equal(generator.get_state(), state) for generator, state in zip(made, states, strict=True))
    # a quantile of the predicted clean sample takes a launch of its own
    assert len(called) == len(ours.timesteps) * (2 if config.get("thresholding") else 1)
    assert not ours.accelerated.fallbacks


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim_loop_with_noise(eta):
    plain = prepared("DDIM", 20, {"beta_schedule": "squaredcos_cap_v2"})
    ours, x = accelerate(plain), normal(3, *SHAPE)
    torch.manual_seed(4)
    expected = loop(plain, x, eta=eta)
    state = torch.get_rng_state()
    torch.manual_seed(4)
    close(loop(ours, x, eta=eta, use_clipped_model_output=False), expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["DDPM", "DDIM", "DPMSolverMultistep", "EulerAncestralDiscrete"])
def test_loop_in_16_bits(name, dtype):
    plain = prepared(name, 10, {})
    x = (normal(3, *SHAPE) * plain.init_noise_sigma).to(dtype)
    expected = loop(plain, x, generator=seeded(1))
    found = loop(accelerate(prepared(name, 10, {})), x, generator=seeded(1))
    assert found.dtype == expected.dtype == dtype
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=20 * torch.finfo(dtype).eps * scale)


@pytest.mark.parametrize("name, config", IMAGES)
def test_image_to_image(name, config):
    """From the middle on, by set_begin_index; noise is added before the first step, and to a known half after each."""
    clean, z = normal(1, *SHAPE), normal(2, *SHAPE)
    results = []
    for scheduler in (prepared(name, 20, config), accelerate(prepared(name, 20, config))):
        generator = seeded(5)
        timesteps = scheduler.timesteps[12:]
        scheduler.set_begin_index(12)
        with launches() as called:
            x = scheduler.add_noise(clean, z, timesteps[:1].repeat(SHAPE[0]))
            noisy = x
            for i, t in enumerate(timesteps):
                m = model(scheduler.scale_model_input(x, t), t)
                x = scheduler.step(m, t, x, generator=generator).prev_sample
                if i < len(timesteps) - 1:
                    known = scheduler.add_noise(clean, z, timesteps[i + 1 : i + 2].repeat(SHAPE[0]))
                    x[..., :3] = known[..., :3]
        results.append((x, noisy, scheduler.step_index, called))
    (expected, noisy, index, none), (found, same, ours, called) = results
    close(found, expected)
    close(same, noisy)
    assert index == ours == 20
    assert not none
    assert called.count("linear_step" if "DPM" in name else "extended_step") == called.count("forward_process") == 8


@pytest.mark.parametrize("name, config", IMAGES)
def test_from_the_middle_without_a_begin_index(name, config):
    results = []
    for scheduler in (prepared(name, 20, config), accelerate(prepared(name, 20, config))):
        timesteps = scheduler.timesteps[7:]
        x = scheduler.add_noise(normal(1, *SHAPE), normal(2, *SHAPE), timesteps[:1].repeat(SHAPE[0]))
        results.append(loop(scheduler, x, timesteps=timesteps, generator=seeded(5)))
    close(*reversed(results))


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "DPMSolverMultistep", "EulerDiscrete", "EulerAncestralDiscrete"])
def test_loops_one_after_another(name):
    """set_timesteps begins a new loop, with as many steps or another number."""
    plain, ours, x = make(name), accelerate(make(name)), normal(1, *SHAPE)
    for steps in (10, 10, 4, 25):
        for scheduler in (plain, ours):
            scheduler.set_timesteps(steps)
        close(loop(ours, x, generator=seeded(steps)), loop(plain, x, generator=seeded(steps)))
    assert not ours.accelerated.fallbacks


# ------------------------------------------------------------------------------------------- timesteps on a device


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "DDIMInverse", "DPMSolverMultistep", "EulerAncestralDiscrete"])
def test_timesteps_elsewhere_are_read_once(name):
    """Not in each step: on a GPU, each read would wait for all earlier launches."""
    plain, ours = prepared(name, 10, {}), accelerate(prepared(name, 10, {}))
    x = normal(1, *SHAPE)
    expected = loop(plain, x, **generators(name, False)[0])
    ours.timesteps = ours.timesteps.as_subclass(Elsewhere)
    given = generators(name, False)[0]
    timesteps = list(ours.timesteps)
    Elsewhere.reads = 0
    reads = []
    for t, known in zip(timesteps, plain.timesteps, strict=True):
        x = ours.step(model(ours.scale_model_input(x, t), known), t, x, **given)[0]
        reads.append(Elsewhere.reads)
    assert 0 < reads[0] == reads[-1] <= 4
    close(x, expected)


def test_a_timestep_elsewhere_that_is_no_view_is_read():
    ours = accelerate(prepared("DDIM", 10, {}))
    x, m = normal(1, *SHAPE), normal(2, *SHAPE)
    expected = ours.step(m, 500, x).prev_sample
    ours.timesteps = ours.timesteps.as_subclass(Elsewhere)
    Elsewhere.reads = 0
    for kind in (torch.int64, torch.int32):
        t = torch.tensor(500, dtype=kind).as_subclass(Elsewhere)
        assert torch.equal(ours.step(m, t, x).prev_sample, expected)
    assert Elsewhere.reads == 2


@pytest.mark.parametrize("cut", [slice(4, None), slice(None, 5), slice(None, None, 2), slice(1, None, 3)])
def test_a_timestep_is_found_by_where_it_lies_in_any_view(cut):
    """Of a slice of timesteps, those before, after and in between are no elements."""
    ours = accelerate(prepared("DDIM", 10, {}))
    whole = ours.timesteps.as_subclass(Elsewhere)
    ours.timesteps = whole[cut]
    Elsewhere.reads = 0
    found = [ours._host_timestep(t) for t in whole]
    assert found == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    left_out = len(whole) - len(ours.timesteps)
    assert left_out < Elsewhere.reads <= left_out + 2


@pytest.mark.parametrize(
    "name", ["DDIM", "DPMSolverMultistep", "EulerDiscrete", "UniPCMultistep", "PNDM", "LMSDiscrete"]
)
def test_views(name):
    """A panorama's views are denoised in turn at each timestep, each with attributes of its own, which the pipeline
    copies after a step and puts back before the next one."""
    config = {"skip_prk_steps": True} if name == "PNDM" else {}

    def views(scheduler):
        scheduler.set_timesteps(6)
        samples = [normal(i, *SHAPE) for i in range(3)]
        attributes = [copy.deepcopy(scheduler.__dict__)] * 3
        for t in scheduler.timesteps:
            for i, x in enumerate(samples):
                scheduler.__dict__.update(attributes[i])
                m = model(scheduler.scale_model_input(x, t), t)
                samples[i] = scheduler.step(m, t, x).prev_sample
                attributes[i] = copy.deepcopy(scheduler.__dict__)
        return samples

    plain = make(name, **config)
    ours = accelerate(plain)
    with launches() as called:
        found = views(ours)
    assert len(called) == 3 * len(ours.timesteps)
    for x, y in zip(found, views(plain), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
