"""Whole loops with accelerated diffusers schedulers beside those with diffusers' own, from the same generators."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")

from support.accelerated_diffusers import Elsewhere, close, given, loop, make, model, normal, prepared, seeded
from support.launches import launches

from ddpm_ext.integrations import accelerate

SHAPE = (3, 2, 5, 6)
# Name, steps or timesteps, config, options of each step. Any configurations are drawn in test_accelerated_diffusers.py
# and test_accelerated_diffusers_traced_configs.py.
CONFIGS = [
    ("DDPM", 20, {"thresholding": True, "sample_max_value": 3.0, "prediction_type": "v_prediction"}, {}),
    ("DDPM", 25, {"variance_type": "learned_range", "timestep_spacing": "trailing"}, {}),
    ("DDPM", 25, {"variance_type": "learned", "clip_sample": False, "prediction_type": "sample"}, {}),
    ("DDPM", [999, 700, 320, 77, 20], {"clip_sample_range": 2.0}, {}),
    ("DDIM", 20, {"beta_schedule": "squaredcos_cap_v2"}, {"eta": 0.4, "use_clipped_model_output": True}),
    ("DDIMInverse", 50, {"set_alpha_to_one": False, "prediction_type": "v_prediction"}, {}),
    ("DPMSolverMultistep", [900, 500, 444, 20], {"prediction_type": "sample", "solver_order": 1}, {}),
    ("EulerAncestralDiscrete", 12, {"beta_schedule": "scaled_linear"}, {}),
]
IDS = [f"{config[0]}{i}" for i, config in enumerate(CONFIGS)]


@pytest.mark.parametrize("source", ["default", "generator", "generators"])
@pytest.mark.parametrize("name, steps, config, options", CONFIGS, ids=IDS)
def test_loop(name, steps, config, options, source):
    plain = prepared(name, steps, **config)
    ours, x = accelerate(plain), normal(3, *SHAPE) * plain.init_noise_sigma
    channels = SHAPE[1] * (2 if "learned" in config.get("variance_type", "") else 1)
    results, states = [], []
    for scheduler in (plain, ours):
        torch.manual_seed(4)
        made = [] if source == "default" else [seeded(i) for i in range(SHAPE[0] if source == "generators" else 1)]
        generator = {"generator": made if source == "generators" else made[0]} if made and name != "DDIMInverse" else {}
        with launches() as called:
            results.append(loop(scheduler, x, channels, **generator, **options))
        states.append([torch.get_rng_state(), *(generator.get_state() for generator in made)])
    close(*reversed(results))
    assert all(map(torch.equal, *states))
    # a quantile of the predicted clean sample takes a launch of its own
    assert len(called) == len(ours.timesteps) * (2 if config.get("thresholding") else 1)
    assert not ours.accelerated.fallbacks


# ------------------------------------------------------------------------------------------- timesteps on a device


@pytest.mark.parametrize("name", ["DDPM", "DDIMInverse", "DPMSolverMultistep", "EulerAncestralDiscrete"])
def test_timesteps_elsewhere_are_read_once(name):
    """Not in each step: on a GPU, each read would wait for all earlier launches."""
    plain, ours = prepared(name), accelerate(prepared(name))
    x, results, reads = normal(1, *SHAPE), [], []
    ours.timesteps = ours.timesteps.as_subclass(Elsewhere)
    for scheduler in (plain, ours):
        results.append(x)
        timesteps, generator = list(scheduler.timesteps), given(name)
        Elsewhere.reads = 0
        for t, known in zip(timesteps, plain.timesteps, strict=True):
            m = model(scheduler.scale_model_input(results[-1], t), known)
            results[-1] = scheduler.step(m, t, results[-1], **generator)[0]
            reads.append(Elsewhere.reads)
    assert 0 < reads[10] == reads[-1] <= 5
    close(*reversed(results))


@pytest.mark.parametrize("cut", [slice(4, None), slice(None, 5), slice(None, None, 2), slice(1, None, 3)])
def test_a_timestep_is_found_by_where_it_lies_in_any_view(cut):
    """Of a slice of timesteps, those before, after and in between are no elements."""
    ours, places = accelerate(prepared("DDIM")), range(10)[cut]
    whole = ours.timesteps
    ours.timesteps = whole[cut]
    found = [ours._index_of(t) for t in whole]
    assert found == [places.index(i) if i in places else None for i in range(10)]


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "UniPCMultistep", "PNDM"])
def test_views(name):
    """A panorama's views are denoised in turn at each timestep, each with attributes of its own, which the pipeline
    copies after a step and puts back before the next one."""

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

    plain = make(name, **({"skip_prk_steps": True} if name == "PNDM" else {}))
    ours = accelerate(plain)
    with launches() as called:
        found = views(ours)
    assert len(called) == 3 * len(ours.timesteps)
    for x, y in zip(found, views(plain), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
