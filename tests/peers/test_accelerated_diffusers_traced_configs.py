"""Loops of traced schedulers of any configuration, against diffusers in float64."""

import inspect

import pytest
import torch

pytest.importorskip("diffusers")

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.accelerated_diffusers import FACTOR
from support.diffusers_classes import TRACED, check, classes, loop, make
from support.launches import launches

from ddpm_ext import accelerate

# What a class's constructor may be given, where it has the parameter. What diffusers refuses is not tried.
CHOICES = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction"],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "steps_offset": [0, 1],
    "rescale_betas_zero_snr": [False, True],
    "set_alpha_to_one": [False, True],
    "clip_sample": [False, True],
    "clip_sample_range": [1.0, 0.5],
    "clip_denoised": [True, False],
    "s_noise": [1.0, 0.8],
    "thresholding": [False, False, True],
    "dynamic_thresholding_ratio": [0.995, 0.6],
    "sample_max_value": [1.0, 1.5],
    "solver_order": [1, 2, 3],
    "predictor_order": [1, 2, 3],
    "corrector_order": [0, 1, 2],
    "solver_type": ["midpoint", "heun", "bh1", "bh2", "logrho"],
    "algorithm_type": ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver", "deis", "data_prediction"],
    "predict_x0": [True, False],
    "lower_order_final": [True, False],
    "euler_at_final": [False, True],
    "final_sigmas_type": ["zero", "sigma_min"],
    "timestep_type": ["discrete", "continuous"],
    "interpolation_type": ["linear", "log_linear"],
    "sigma_schedule": ["karras", "exponential"],
    "variance_type": ["fixed_small", "fixed_small_log", "fixed_large"],
    "skip_prk_steps": [True],
    "shift": [1.0, 3.0],
    "flow_shift": [1.0, 3.0],
    "invert_sigmas": [False, True],
    "stochastic_sampling": [False, True],
}
# Of which the steps of some classes take these alone.
EDM = {"prediction_type": ["epsilon", "v_prediction"]}
TAKEN = {
    "CogVideoXDPMScheduler": {"prediction_type": ["epsilon", "sample", "v_prediction"]},
    "EDMDPMSolverMultistepScheduler": EDM,
    "EDMEulerScheduler": EDM,
    "UnCLIPScheduler": {
        "prediction_type": ["epsilon", "sample"],
        "variance_type": ["fixed_small_log"],
        "beta_schedule": ["squaredcos_cap_v2"],
    },
}
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", "use_lu_lambdas")


@st.composite
def configs(draw, name):
    parameters = inspect.signature(classes()[name].__init__).parameters
    choices = CHOICES | TAKEN.get(name, {})
    config = {key: draw(st.sampled_from(values)) for key, values in choices.items() if key in parameters}
    for key in ("prediction_type", "variance_type"):
        if key in config and parameters[key].default not in CHOICES[key]:
            del config[key]
    chosen = draw(st.sampled_from([None, *(key for key in SIGMAS if key in parameters)]))
    return config if chosen is None else config | {chosen: True}


# Whose own code may be no row for other reasons than a clip: rounding, and more history than rows keep.
MORE_HISTORY = ("HeunDiscreteScheduler", "SASolverScheduler", "DPMSolverSinglestepScheduler")


def has_huge_levels(config):
    """Of noise, beside which rounding is as large as what a step makes of an output."""
    return config.get("use_flow_sigmas") or config.get("beta_schedule") == "squaredcos_cap_v2"


def off(found, truth):
    return (found.double() - truth.double()).abs().max().item()


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.filterwarnings("ignore")
def test_any_configuration(name):
    """At most a few times as far from float64 as diffusers, with a launch a step or two with a threshold, or equal."""

    examples = 3 if "KDPM2" in name else 10  # whose own set_timesteps takes a tenth of a second

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(configs(name), st.sampled_from([2, 5, 9]))
    def a_loop_is_the_same(config, steps):
        try:
            theirs = loop(make(name, **config), steps)
            truth, _ = loop(make(name, **config), steps, torch.float64, rounded=torch.float32)
        except Exception:
            assume(False)
        assume(all(x.isfinite().all() for result in theirs[0] for x in result if x is not None))
        ours = accelerate(make(name, **config))
        with launches() as called:
            found = loop(ours, steps)
        if ours.accelerated.fallbacks:
            clips = ours.config.get("thresholding") or ours.config.get("clip_sample")
            assert clips or name in MORE_HISTORY or has_huge_levels(config)
            check(found, theirs, 0)
            return
        assert len(called) in (len(theirs[0]), 2 * len(theirs[0]))
        assert torch.equal(found[1], theirs[1])
        for results in zip(found[0], theirs[0], truth, strict=True):
            for x, y, z in zip(*results, strict=True):
                if y is not None:
                    assert x.dtype == y.dtype
                    assert off(x, z) <= max(FACTOR * off(y, z), 1e-5 * z.abs().max().item())

    a_loop_is_the_same()


@pytest.mark.parametrize(
    "name, edits",
    [
        ("DDIMParallelScheduler", {"clip_sample": False}),
        ("DDIMParallelScheduler", {"clip_sample_range": 0.4}),
        ("DDPMParallelScheduler", {"thresholding": True, "sample_max_value": 1.5}),
        ("HeunDiscreteScheduler", {"clip_sample": True, "clip_sample_range": 0.6}),
    ],
)
@pytest.mark.filterwarnings("error:step runs the own code")
def test_a_config_that_is_edited_by_its_attributes(name, edits):
    """Its items are other ones then, which diffusers does not read."""
    plain, ours = make(name), accelerate(make(name))
    loop(ours, 7)
    for scheduler in (plain, ours):
        for key, value in edits.items():
            setattr(scheduler.config, key, value)
    theirs = loop(plain, 7)
    with launches() as called:
        check(loop(ours, 7), theirs, 1e-5)
    assert len(called) == len(theirs[0]) * (2 if "thresholding" in edits else 1)
    assert not all(torch.equal(x[0], y[0]) for x, y in zip(theirs[0], loop(make(name), 7)[0], strict=True))
