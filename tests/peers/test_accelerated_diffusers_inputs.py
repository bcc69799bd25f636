"""The inputs of an accelerated diffusers scheduler's step: what runs diffusers' own code, and what is refused."""

import copy
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from support.accelerated_diffusers import NAMES, SIGMA, compare, given, normal, prepared, seeded
from support.launches import launches

from ddpm_ext.integrations import accelerate

SHAPE = (2, 3, 4, 5)
X, M, Z = (normal(i, *SHAPE) for i in range(3))
HALF = {"m": M.half(), "x": X.half()}
SDE = {"algorithm_type": "sde-dpmsolver++"}

names = pytest.mark.parametrize("name", NAMES)
of_alphas = pytest.mark.parametrize("name", ["DDPM", "DDIM", "DDIMInverse"])


def at_third(name, **config):
    """The scheduler at its third step, and the timestep there."""
    scheduler = prepared(name, **config)
    if name in SIGMA:
        scheduler._step_index, scheduler.is_scale_input_called = 2, True
    return scheduler, scheduler.timesteps[2]


def outcome(call):
    """The type and the text of the error that it raises."""
    with pytest.raises(Exception) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()
    return caught.type, str(caught.value)


# ------------------------------------------------------------------------------------------ what runs the own code


@pytest.mark.parametrize(
    "name, config, inputs, why",
    [
        ("DDIM", {}, {"m": M.double(), "x": X.double()}, "its samples are float64"),
        ("EulerDiscrete", {}, {"m": M.double(), "x": X.double()}, "its samples are float64"),
        ("DDPM", {}, {"m": M.double()}, "the model's output is float64"),
        ("DDIMInverse", {}, {"m": M.long()}, "the model's output is int64"),
        ("DDIM", {}, {"m": M[0, 0, 0], "x": X[0, 0, 0]}, "its samples have no channels"),
        ("EulerAncestralDiscrete", {}, {"m": M[0, 0, 0], "x": X[0, 0, 0]}, "its samples have no channels"),
        # diffusers looks up tensors with a dimension by it, which promote 16 bits to float32
        ("DDIM", {}, HALF | {"t": torch.tensor([700])}, "its timestep has dimensions, and its samples 16 bits"),
        ("DDIM", {}, {"noise": Z.double(), "eta": 0.5}, "variance_noise is float64"),
        ("DDIM", {}, {"noise": (3 * Z).long(), "eta": 0.5}, "variance_noise is int64"),
        ("DDIM", {}, {"noise": Z[:1], "eta": 1.0}, "its tensors have different shapes"),
        ("DPMSolverMultistep", SDE, {"noise": Z.double()}, "variance_noise is float64"),
        ("DPMSolverMultistep", SDE, {"noise": Z[:1]}, "it is called with variance_noise of shape (1, 3, 4, 5)"),
        ("DDIM", {}, {"eta": 1.2}, "eta is 1.2"),
        ("DDIM", {}, {"eta": -0.5}, "eta is -0.5"),
        ("DDIM", {}, {"eta": float("nan")}, "eta is nan"),
        ("DDIM", {"clip_sample_range": -0.5}, {}, "clip_sample_range is -0.5"),
        # diffusers takes the square root of a logarithm
        ("DDPM", {"variance_type": "fixed_large_log"}, {}, "variance_type is 'fixed_large_log'"),
        *(
            (
                "DDIM",
                {"thresholding": True, "dynamic_thresholding_ratio": ratio, "sample_max_value": most},
                {},
                f"dynamic_thresholding_ratio is {ratio}, sample_max_value is {most}",
            )
            for ratio, most in ((0.5, 0.7), (0.9, float("nan")), (0.0, 1.0))
        ),
    ],
)
def test_what_runs_the_own_code(name, config, inputs, why):
    """With a result of diffusers' bits, and its draws."""
    plain, t = at_third(name, **config)
    inputs = {"m": M, "t": t, "x": X} | inputs
    scheduler, fused = compare(name, plain, inputs.pop("m"), inputs.pop("t"), inputs.pop("x"), **inputs)
    assert not fused and scheduler.accelerated.fallbacks == {"step": why}


def test_a_variance_that_is_set_beside_the_config():
    """diffusers reads the attribute in one place and the config in another."""
    plain, t = at_third("DDPM")
    plain.variance_type = "fixed_small_log"
    scheduler, fused = compare("DDPM", plain, M, t, X)
    assert not fused and scheduler.accelerated.fallbacks == {"step": "variance_type is not its config's"}


@names
@pytest.mark.filterwarnings("ignore:.*a gradient is asked for")
@pytest.mark.parametrize("of", ["model_output", "sample"])
def test_gradients_through_a_step_run_the_own_code(name, of):
    plain, t = at_third(name)
    gradients = []
    for scheduler in (plain, accelerate(plain)):
        m, x = M.clone().requires_grad_(of == "model_output"), X.clone().requires_grad_(of == "sample")
        result = copy.deepcopy(scheduler).step(m, t, x, return_dict=False, **given(name))
        result[0].square().sum().backward()
        gradients.append((m if of == "model_output" else x).grad)
    assert torch.equal(*gradients)


@names
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_they_are_fused(name, mode):
    """Also where tensors require a gradient. What is cached then can be used with gradients later."""
    plain, t = at_third(name)
    scheduler = accelerate(plain)
    m = M.clone().requires_grad_()
    with mode(), launches() as called:
        scheduler.set_timesteps(10)
        for output in (m, M):
            if name in SIGMA:
                scheduler._step_index = 2
            scheduler.step(output, t, X, **given(name))
        assert len(called) == 2
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(X, t)
    if hasattr(scheduler, "add_noise"):
        x = X.clone().requires_grad_()
        with launches() as called:
            noisy = scheduler.add_noise(scheduler.scale_model_input(x, t), Z, scheduler.timesteps[:2])
        noisy.sum().backward()
        assert called and x.grad is not None


# ------------------------------------------------------------------------------------------- odd inputs that fit


@of_alphas
@pytest.mark.parametrize("kind", [int, np.int32, lambda t: torch.tensor(t).int(), lambda t: torch.tensor([t])])
def test_kinds_of_timesteps(name, kind):
    plain, t = at_third(name)
    assert compare(name, plain, M, kind(int(t)), X)[1]


def test_steps_of_the_own_code_without_a_warning():
    """What diffusers takes in its own way: a timestep counted from the end; no variance where none is read."""
    plain, _ = at_third("DDIM")
    assert not compare("DDIM", plain, M, -100, X)[1]
    plain, _ = at_third("DDPM", variance_type="learned")
    assert not compare("DDPM", plain, M, 0, X)[1]


@pytest.mark.parametrize(
    "name, config, change, inputs",
    [
        *((name, {}, None, {"t": t}) for name in SIGMA for t in (3, torch.tensor(3))),
        *(
            (name, {}, None, {"t": t})
            for name in NAMES[:3]
            for t in (1000, torch.tensor(1000), 2.5, torch.tensor(2.5), None, "3")
        ),
        *((name, {}, {"_step_index": 10}, {}) for name in SIGMA),
        ("EulerAncestralDiscrete", {"prediction_type": "sample"}, None, {}),
        *((name, {"prediction_type": "x0"}, None, {}) for name in NAMES),
        *((name, {}, None, {"m": normal(1, 2, 3, 4, 4)}) for name in NAMES),
        *((name, {}, None, {"m": [1.0]}) for name in NAMES),
        *((name, {}, None, {"unknown": 1}) for name in NAMES),
        ("EulerDiscrete", {}, None, {"s_churn": None}),
        ("DDPM", {}, None, {"m": M.long()}),  # there is no such noise
        ("DDPM", {"variance_type": "learned"}, None, {}),
        ("DDPM", {"variance_type": "learned_range"}, None, {}),
        ("DDPM", {}, None, {"t": 401}),  # between its timesteps
        ("DPMSolverMultistep", {"variance_type": "learned"}, None, dict.fromkeys("mx", normal(1, 2, 4, 4, 4))),
        ("DDIM", {}, {"num_inference_steps": None}, {}),
        ("DDIMInverse", {}, {"num_inference_steps": None}, {}),
        ("DDIM", {}, None, {"eta": 1.0, "variance_noise": Z, "generator": seeded(1)}),
    ],
)
def test_what_is_refused(name, config, change, inputs):
    plain, t = at_third(name, **config)
    vars(plain).update(change or {})
    inputs = {"m": M, "t": t, "x": X} | inputs
    m, t, x = (inputs.pop(key) for key in "mtx")
    ours = accelerate(plain)
    assert outcome(lambda: ours.step(m, t, x, **inputs)) == outcome(lambda: plain.step(m, t, x, **inputs))
