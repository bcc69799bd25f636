"""diffusers' pipeline with the digits model, before and after accelerate: the same digits, and the time of a step."""

import statistics
import time

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm_ext import accelerate
from ddpm_ext.models.folder import DIGITS

STEPS = 50

plain = DDPMPipeline(unet=UNet2DModel.from_pretrained(DIGITS), scheduler=DDPMScheduler.from_pretrained(DIGITS))
plain.set_progress_bar_config(disable=True)
ours = accelerate(plain)  # plain stays as it is; both share the model


def digits(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline(batch_size=16, generator=generator, num_inference_steps=STEPS, output_type="np").images


def microseconds(scheduler, shape=(64, 3, 32, 32), repeats=200):
    """The median time of a step without the model."""
    scheduler.set_timesteps(STEPS)
    x, m = torch.randn(2, *shape)
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        scheduler.step(m, 500, x)
        taken.append(time.perf_counter() - start)
    return 1e6 * statistics.median(taken)


print(f"16 digits in {STEPS} steps: at most {abs(digits(ours) - digits(plain)).max():.1e} apart (0 is black, 1 white)")
print("a step of 64x3x32x32, without the model's call:")
for name, scheduler in (
    ("diffusers", plain.scheduler),
    ("accelerate", ours.scheduler),
    ('accelerate, noise="philox"', accelerate(plain.scheduler, noise="philox", seed=0)),
):
    print(f"  {name:26} {microseconds(scheduler):6.0f} µs")
print("what ran diffusers' own code:", ours.scheduler.accelerated.fallbacks or "nothing")
