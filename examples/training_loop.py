"""A model of scikit-learn's digits in a few seconds on a CPU: train_losses in a loop of your own, then samples.

train_losses takes two launches beside the model: one for x_t, one for the loss and its slope. The noise takes no
memory of its own. For a long training run, use `ddpm-ext train`.
"""

import math

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ddpm_ext import GaussianDiffusion, Philox

TIMESTEPS, BATCH, STEPS, WIDTH = 200, 128, 1000, 256


class Denoiser(nn.Module):
    """Three layers, which get the timestep as waves of four lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequency", math.pi * 2.0 ** torch.arange(4) / TIMESTEPS)
        self.layers = nn.Sequential(
            nn.Linear(64 + 8, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 64)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * self.frequency
        inputs = torch.cat([x.flatten(1), angle.sin(), angle.cos()], 1)
        return self.layers(inputs).view_as(x)


def distance(images: Tensor) -> float:
    """The average distance of an image from the nearest digit."""
    return torch.cdist(images.flatten(1), digits.flatten(1)).min(1).values.mean().item()


torch.set_num_threads(1)  # a model this small is fastest on one thread
torch.manual_seed(0)
digits = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1  # (1797, 1, 8, 8) in [-1, 1]
model = Denoiser()
diffusion = GaussianDiffusion(TIMESTEPS, "cosine", prediction="v")
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

mean = 0.0
for step in range(1, STEPS + 1):
    images = digits[torch.randint(0, len(digits), (BATCH,))]
    t = torch.randint(0, TIMESTEPS, (BATCH,))
    loss = diffusion.train_losses(model, images, t, weighting="min_snr")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    mean += (loss.item() - mean) / min(step, 100)
    if step % 250 == 0:
        print(f"step {step}: loss {mean:.3f}")

samples = diffusion.sample(model, 8, batch_size=64, channels=1, rng=Philox(0), record="last", progress=False)
noise = torch.randn(64, 1, 8, 8).clamp(-1, 1)
print(f"from the nearest digit: samples {distance(samples):.2f}, noise {distance(noise):.2f}")
for row in samples[:6, 0].add(1).mul(2).clamp(0, 4).round().int().permute(1, 0, 2).tolist():
    print("  ".join("".join(" .+*#"[level] for level in line for _ in (0, 1)) for line in row))
