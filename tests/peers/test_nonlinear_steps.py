"""Steps that are not linear: tracing refuses them, and accelerated schedulers run them as they are."""

import functools
import inspect

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers

from ddpm_ext import accelerate
from ddpm_ext.tables.step_table import StepTable

NAMES = ("DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
SHAPE, STEPS = (2, 4, 16, 16), 8
# Changes of a model output m. `progress` goes from 0 in the first step of a loop to 1 in the last. A trace with samples
# of a single number, or with the same batch in every run, would not see any of these changes.
CHANGES = {
    "divided by its standard deviation": lambda m, progress: m / m.std(),
    "divided by its largest value": lambda m, progress: m / m.abs().max(),
    "divided by the norm of each sample": lambda m, progress: m / m.flatten(1).norm(dim=1).view(-1, 1, 1, 1),
    "doubled if its mean is positive": lambda m, progress: m * 2 if m.mean() > 0 else m,
    "doubled if its mean is negative": lambda m, progress: m * 2 if m.mean() < 0 else m,
    "less the mean of each sample": lambda m, progress: m - m.mean(dim=(1, 2, 3), keepdim=True),
    "less the mean of each channel": lambda m, progress: m - m.mean(dim=(2, 3), keepdim=True),
    "less its mean": lambda m, progress: m - m.mean(),
    "flipped along the width": lambda m, progress: m.flip(-1),
    "flipped along the height": lambda m, progress: m.flip(-2),
    "channels in reverse order": lambda m, progress: m.flip(1),
    "samples in reverse order": lambda m, progress: m.flip(0),
    "rolled": lambda m, progress: m.roll(2, -1),
    "scaled by its size": lambda m, progress: m * (m.numel() / 1000),
    "scaled by its width": lambda m, progress: m * (m.shape[-1] / 8),
    "scaled by a ramp": lambda m, progress: m * torch.linspace(0.5, 1.5, m.shape[-1], dtype=m.dtype),
    "first channel doubled": lambda m, progress: torch.cat([2 * m[:, :1], m[:, 1:]], 1),
    "blurred": lambda m, progress: torch.nn.functional.avg_pool2d(m, 3, 1, 1, count_include_pad=False),
    "tanh": lambda m, progress: m.tanh(),
    "clamped": lambda m, progress: m.clamp(-3 * m.std(), 3 * m.std()),
    "normalised in the first step": lambda m, progress: m / m.std() if progress == 0 else m,
    "normalised in the last step": lambda m, progress: m / m.std() if progress == 1 else m,
    "normalised in the middle": lambda m, progress: m / m.std() if 0.4 < progress < 0.6 else m,
}


def subclass(cls, change):
    """A subclass whose step changes the model output first."""

    @functools.wraps(cls.step)
    def step(self, model_output, timestep, sample, *args, **kwargs):
        progress = int((self.timesteps == timestep).nonzero()[0]) / (len(self.timesteps) - 1)
        return cls.step(self, change(model_output, progress), timestep, sample, *args, **kwargs)

    return type(cls.__name__, (cls,), {"step": step})


def images(scheduler):
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(STEPS)
    x = torch.randn(SHAPE, generator=generator)
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        m = torch.randn(SHAPE, generator=generator) + 0.1
        x = scheduler.step(m, t, scheduler.scale_model_input(x, t), **options).prev_sample
    return x


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_steps_that_are_not_linear(name, kind):
    cls = subclass(getattr(diffusers, name), CHANGES[kind])
    config = {"clip_sample": False} if "clip_sample" in cls().config else {}
    with pytest.raises(ValueError, match=r"is not linear|reads more"):
        StepTable.trace(cls(**config), STEPS)
    ours, expected = accelerate(cls(), trace=True), images(cls())
    for _ in range(2):
        assert torch.equal(images(ours), expected)
    assert ours.accelerated.fused_calls == 0
