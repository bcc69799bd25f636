"""The inputs of an accelerated diffusers scheduler's step: dtypes, timesteps, gradients, and what is refused."""

import copy
import warnings

import numpy as np
import pytest
import torch
from support.warned import user_warnings

pytest.importorskip("diffusers")

from support.accelerated_diffusers import NAMES, SIGMA, compare, equal, launches, make, normal, seeded

from ddpm_ext.integrations import accelerate

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")

SHAPE = (2, 3, 4, 5)
X, M, Z = (normal(i, *SHAPE) for i in range(3))
EULER = ("EulerDiscrete", "EulerAncestralDiscrete")
OWN = "step runs the own code of diffusers: "

names = pytest.mark.parametrize("name", NAMES)
of_alphas = pytest.mark.parametrize("name", ["DDPM", "DDIM", "DDIMInverse"])
euler = pytest.mark.parametrize("name", EULER)


def at_third(name, **config):
    """The scheduler at its third step, and the timestep there."""
    scheduler = make(name, **config)
    scheduler.set_timesteps(10)
    if name in SIGMA:
        scheduler._step_index, scheduler.is_scale_input_called = 2, True
    return scheduler, scheduler.timesteps[2]


def given(name):
    return {} if name == "DDIMInverse" else {"generator": seeded(1)}


# ----------------------------------------------------------------------------------------------------------- dtypes


@names
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("of_sample", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of_model", [torch.float32, torch.float16, torch.bfloat16])
def test_16_bits_in_and_out(name, prediction, of_sample, of_model):
    """Results have diffusers' dtypes. A predicted clean sample may be the model's output, in the output's dtype."""
    if name == "EulerAncestralDiscrete" and prediction == "sample":
        pytest.skip("it has none")
    plain, t = at_third(name, prediction_type=prediction)
    _, fused = compare(name, plain, M.to(of_model), t, X.to(of_sample))
    assert fused == ({of_model, of_sample} != {torch.float16, torch.bfloat16})


@names
def test_float64_samples_run_the_own_code(name):
    plain, t = at_third(name)
    scheduler, fused = compare(name, plain, M.double(), t, X.double())
    assert not fused
    assert scheduler.accelerated.fallbacks == {"step": "its samples are float64"}


@names
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_a_models_output_of_another_dtype_runs_the_own_code(name, dtype):
    plain, t = at_third(name)
    if name in ("DDPM", "EulerAncestralDiscrete") and dtype == torch.int64:
        with pytest.raises(NotImplementedError), pytest.warns(UserWarning):  # there is no such noise
            accelerate(plain).step(M.to(dtype), t, X)
        return
    scheduler, fused = compare(name, plain, M.to(dtype), t, X)
    assert not fused
    assert scheduler.accelerated.fallbacks == {"step": f"the model's output is {str(dtype)[6:]}"}


@pytest.mark.parametrize("of_noise", [torch.float64, torch.float32, torch.float16, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_variance_noise_of_another_dtype(of_noise, dtype):
    """The result has the wider dtype, but the predicted clean sample doesn't."""
    plain, t = at_third("DDIM")
    z = (3 * Z).to(of_noise)
    scheduler, fused = compare("DDIM", plain, M.to(dtype), t, X.to(dtype), noise=z, eta=0.5)
    assert fused == (of_noise.is_floating_point and torch.promote_types(of_noise, dtype) == dtype)
    assert fused or scheduler.accelerated.fallbacks == {"step": f"variance_noise is {str(of_noise)[6:]}"}


@pytest.mark.parametrize("of_noise", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_variance_noise_of_another_dtype_in_an_sde(of_noise, dtype):
    plain, t = at_third("DPMSolverMultistep", algorithm_type="sde-dpmsolver++")
    scheduler, fused = compare("DPMSolverMultistep", plain, M.to(dtype), t, X.to(dtype), noise=Z.to(of_noise))
    assert fused == (torch.promote_types(of_noise, dtype) == dtype)
    assert fused or scheduler.accelerated.fallbacks == {"step": f"variance_noise is {str(of_noise)[6:]}"}


@pytest.mark.parametrize(
    "name, why",
    [
        ("DDIM", "its tensors have different shapes"),
        ("DPMSolverMultistep", "it is called with variance_noise of shape (1, 3, 4, 5)"),
    ],
)
def test_variance_noise_that_is_broadcast_runs_the_own_code(name, why):
    config = {"algorithm_type": "sde-dpmsolver++"} if name == "DPMSolverMultistep" else {}
    plain, t = at_third(name, **config)
    scheduler, fused = compare(name, plain, M, t, X, noise=Z[:1], **({"eta": 1.0} if name == "DDIM" else {}))
    assert not fused
    assert scheduler.accelerated.fallbacks == {"step": why}


@names
def test_no_samples(name):
    plain, t = at_third(name)
    scheduler = accelerate(plain)
    assert scheduler.step(M[:0], t, X[:0], **given(name))[0].shape == (0, *SHAPE[1:])


@pytest.mark.parametrize("name", ["DDIM", "DDIMInverse", "DPMSolverMultistep", *EULER])
def test_samples_without_channels_run_the_own_code(name):
    plain, t = at_third(name)
    scheduler, fused = compare(name, plain, M[0, 0, 0], t, X[0, 0, 0])
    assert not fused
    assert scheduler.accelerated.fallbacks == {"step": "its samples have no channels"}


# -------------------------------------------------------------------------------------------------------- timesteps


@of_alphas
@pytest.mark.parametrize("kind", [int, np.int64, np.int32, torch.tensor, lambda t: torch.tensor(t, dtype=torch.int32)])
def test_kinds_of_timesteps(name, kind):
    plain, t = at_third(name)
    assert compare(name, plain, M, kind(int(t)), X)[1]


@of_alphas
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_a_timestep_with_a_dimension(name, dtype, prediction):
    """diffusers looks up tensors with a dimension by it, which promote 16 bits to float32."""
    plain, t = at_third(name, prediction_type=prediction)
    scheduler, fused = compare(name, plain, M.to(dtype), t.reshape(1), X.to(dtype))
    assert fused == (dtype == torch.float32)
    assert fused or scheduler.accelerated.fallbacks == {"step": "its timestep has dimensions, and its samples 16 bits"}


@of_alphas
@pytest.mark.parametrize("t", [1000, torch.tensor(1000), 2.5, torch.tensor(2.5), None, "3"])
def test_bad_timesteps_are_refused_as_there(name, t):
    plain, _ = at_third(name)
    with pytest.raises(Exception) as theirs:
        plain.step(M, t, X)
    scheduler = accelerate(plain)
    with pytest.raises(type(theirs.value)) as mine:
        scheduler.step(M, t, X)
    assert str(mine.value) == str(theirs.value)
    assert not scheduler.accelerated.fallbacks


@pytest.mark.parametrize("name", ["DDIM", "DDIMInverse"])
def test_a_timestep_counted_from_the_end(name):
    plain, _ = at_third(name)
    assert not compare(name, plain, M, -100, X)[1]


@euler
def test_integers_are_refused(name):
    plain, _ = at_third(name)
    for t in (3, torch.tensor(3)):
        with pytest.raises(ValueError, match="Passing integer indices"):
            accelerate(plain).step(M, t, X)


@euler
def test_without_scale_model_input(name):
    """The step is the same; diffusers logs a warning of it."""
    plain, t = at_third(name)
    plain.is_scale_input_called = False
    assert compare(name, plain, M, t, X)[1]


@pytest.mark.parametrize("name", SIGMA)
def test_past_the_last_step_is_refused_as_there(name):
    plain, t = at_third(name)
    plain._step_index = 10
    for scheduler in (plain, accelerate(plain)):
        with pytest.raises(IndexError):
            scheduler.step(M, t, X, generator=seeded(1))


# ------------------------------------------------------------------------------------------------------- arguments


@names
def test_before_set_timesteps(name):
    plain = make(name)
    if name in ("DDIM", "DPMSolverMultistep"):
        with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
            accelerate(plain).step(M, 5, X)
    elif name == "DDPM":
        assert compare(name, plain, M, 5, X)[1]
    elif name == "DDIMInverse":
        with pytest.raises(TypeError):
            accelerate(plain).step(M, 5, X)
    else:
        scheduler = accelerate(plain)
        scheduler.scale_model_input(X, torch.tensor(5.0))
        assert scheduler.step(M, torch.tensor(5.0), X, generator=seeded(1))[0].shape == SHAPE


@names
def test_a_prediction_type_of_another_name_is_refused(name):
    plain, t = at_third(name)
    scheduler = accelerate(plain)
    scheduler.config.prediction_type = "x0"
    with pytest.raises(ValueError, match="prediction_type given as x0 must be one of"):
        scheduler.step(M, t, X, **given(name))
    assert not scheduler.accelerated.fallbacks or name in EULER


def test_euler_ancestral_has_no_sample_prediction():
    plain, t = at_third("EulerAncestralDiscrete", prediction_type="sample")
    with pytest.raises(NotImplementedError):
        accelerate(plain).step(M, t, X)


@names
def test_shapes_that_do_not_fit_are_refused_as_there(name):
    plain, t = at_third(name)
    with pytest.raises(RuntimeError, match="must match the size"), pytest.warns(UserWarning, match="different shapes"):
        accelerate(plain).step(normal(1, 2, 3, 4, 4), t, X, **given(name))


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_ddpm_without_the_variance_is_refused_as_there(kind):
    plain, t = at_third("DDPM", variance_type=kind)
    with pytest.raises(TypeError):
        accelerate(plain).step(M, t, X)


def test_ddpm_without_the_variance_at_0_needs_none():
    plain, _ = at_third("DDPM", variance_type="learned")
    assert not compare("DDPM", plain, M, 0, X)[1]


@names
def test_no_tensor_is_refused(name):
    plain, t = at_third(name)
    with pytest.raises((AttributeError, TypeError)):
        accelerate(plain).step([1.0], t, X)


# ------------------------------------------------------------------------------------------------------- gradients


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
    m = M.clone().requires_grad_()
    with pytest.warns(UserWarning, match=OWN + "a gradient is asked for"):
        scheduler.step(m, t, X, **given(name))


@names
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_they_are_fused(name, mode):
    """Also where tensors require a gradient. What is cached then can be used with gradients later."""
    plain, t = at_third(name)
    scheduler = accelerate(plain)
    m = M.clone().requires_grad_()
    with mode(), launches() as called:
        scheduler.set_timesteps(10)
        if name in SIGMA:
            scheduler._step_index = 2
        scheduler.step(m, t, X, **given(name))
    assert called
    with launches() as called:
        scheduler.step(M, t, X, **given(name))
        if hasattr(scheduler, "add_noise") and name != "DPMSolverMultistep":
            noisy = scheduler.add_noise(X.clone().requires_grad_(), Z, scheduler.timesteps[:2])
            noisy.sum().backward()
    assert called


# -------------------------------------------------------------------------------------------------------- warnings


def test_a_reason_is_warned_of_once_and_recorded():
    scheduler = accelerate(at_third("DDIM")[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            scheduler.step(M.double(), 300, X)
            scheduler.step(M, 300, X, eta=2.0)
            scheduler.step(M, 300, X)
            scheduler.add_noise(X, Z[:1], torch.tensor(3))
    assert [str(w.message) for w in user_warnings(caught)] == [
        OWN + "the model's output is float64",
        OWN + "eta is 2.0",
        "add_noise runs the own code of diffusers: its tensors have different shapes",
    ]
    assert scheduler.accelerated.fallbacks == {"step": "eta is 2.0", "add_noise": "its tensors have different shapes"}


def test_with_philox_the_warning_mentions_the_noise():
    scheduler = accelerate(at_third("DDIM")[0], noise="philox", seed=0)
    with pytest.warns(UserWarning, match="step runs the own code and noise of diffusers: eta is 2.0"):
        scheduler.step(M, 300, X, eta=2.0)


def test_results_of_the_own_code_are_its():
    plain, t = at_third("DDIM")
    ours = accelerate(plain)
    with pytest.warns(UserWarning):
        found = ours.step(M.double(), t, X)
    expected = plain.step(M.double(), t, X)
    assert type(found) is type(expected)
    equal(found.values(), expected.values())
