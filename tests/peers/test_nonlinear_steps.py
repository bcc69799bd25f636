"""Steps that are no rows of numbers: accelerated, they give the images of their own code, and tracing refuses them."""

import inspect

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from support.nonlinear_steps import CHANGES, changed_before

from ddpm_ext import accelerate
from ddpm_ext.tables.step_table import StepTable

NAMES = ("DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
SHAPE = (2, 4, 16, 16)


def images(scheduler, steps):
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE, generator=generator)
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        m = torch.randn(SHAPE, generator=generator) + 0.1
        x = scheduler.step(m, t, scheduler.scale_model_input(x, t), **options).prev_sample
    return x


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("steps", [8, 2, 1])
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_steps_that_are_no_rows_run_their_own_code(name, kind, steps):
    cls = changed_before(getattr(diffusers, name), CHANGES[kind])
    ours = accelerate(cls())
    torch.testing.assert_close(images(ours, steps), images(cls(), steps), rtol=1e-5, atol=1e-5)
    assert steps < 8 or "step" in ours.accelerated.fallbacks  # a shorter loop may have no step that is changed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", CHANGES)
def test_tracing_refuses_them(name, kind):
    cls = changed_before(getattr(diffusers, name), CHANGES[kind])
    config = {"clip_sample": False} if "clip_sample" in cls().config else {}
    with pytest.raises(ValueError, match=r"is not linear|reads more"):
        StepTable.trace(cls(**config), 8)


THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 1.5}


@pytest.mark.parametrize("name, config", [
    ("DDPMScheduler", THRESHOLD),
    ("DPMSolverMultistepScheduler", THRESHOLD),
    ("UnCLIPScheduler", {}),
    ("CMStochasticIterativeScheduler", {}),
])  # fmt: skip
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_steps_that_clip_and_are_no_rows_run_their_own_code(name, config, kind):
    cls = changed_before(getattr(diffusers, name), CHANGES[kind])
    ours = accelerate(cls(**config))
    torch.testing.assert_close(images(ours, 8), images(cls(**config), 8), rtol=1e-5, atol=1e-5)
    assert "step" in ours.accelerated.fallbacks


@pytest.mark.parametrize("kind", CHANGES)
def test_inputs_that_are_no_factor_of_the_sample_are_scaled_by_the_schedulers_own_code(kind):
    class Scaled(diffusers.EulerDiscreteScheduler):
        def scale_model_input(self, sample, timestep):
            place = float(timestep) == float(self.timesteps[-1])
            return super().scale_model_input(CHANGES[kind](sample, place), timestep)

    results = []
    for scheduler in (Scaled(), accelerate(Scaled())):
        scheduler.set_timesteps(4)
        x = 10 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) - 1
        for t in scheduler.timesteps:
            x = scheduler.step(scheduler.scale_model_input(x, t).clamp(-1, 1), t, x).prev_sample
        results.append(x)
    torch.testing.assert_close(*reversed(results), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_a_wrapper_that_draws_numbers_of_its_own_runs_its_own_code():
    """Whose code is not that of the method which it wraps."""

    def noisy(m, _):
        return m + 0 * torch.rand(1) + torch.randint(2, (1,))

    cls = changed_before(diffusers.EulerDiscreteScheduler, noisy)
    ours = accelerate(cls())
    torch.manual_seed(0)
    expected = images(cls(), 8)
    torch.manual_seed(0)
    torch.testing.assert_close(images(ours, 8), expected, rtol=1e-5, atol=1e-5)
