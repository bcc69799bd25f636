"""The tutorial's sampling loop before and after one line: the same images, with one launch a step.

Use your notebook's GaussianDiffusion in place of the class that is imported here: accelerate recognises it by its
methods, and tries them before it replaces any.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ddpm_ext import accelerate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support.eager_tutorial import GaussianDiffusion

TIMESTEPS, BATCH, SIZE = 200, 16, 32


class Model(nn.Module):
    """Takes the place of the U-Net, so that the loop's own time shows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3, 1, 1), 0.5))
        self.time = nn.Embedding(TIMESTEPS, 3)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.scale * x + self.time(t)[:, :, None, None]


def sample(diffusion: GaussianDiffusion, what: str) -> np.ndarray:
    diffusion.p_sample(model, torch.zeros(BATCH, 3, SIZE, SIZE), torch.zeros(BATCH, dtype=torch.long))  # warms up
    torch.manual_seed(0)
    begin = time.perf_counter()
    images = diffusion.sample(model, SIZE, batch_size=BATCH)
    print(f"{what}: {(time.perf_counter() - begin) / TIMESTEPS * 1e6:.0f} microseconds a step, model and all")
    return images[-1]


torch.set_num_threads(1)  # small images gain little from more threads
torch.manual_seed(1)
model = Model().eval()
gaussian_diffusion = GaussianDiffusion(timesteps=TIMESTEPS)
before = sample(gaussian_diffusion, "as it is")

gaussian_diffusion = accelerate(gaussian_diffusion)  # the one line
after = sample(gaussian_diffusion, "accelerated")
print(f"from the same torch.manual_seed, images differ by {np.abs(after - before).max():.1e} at most")

# The noise belongs to an image, not to its batch: image 5 of seed 0 is the same, whatever else the batch holds.
gaussian_diffusion = accelerate(gaussian_diffusion, noise="philox", seed=0)
whole = sample(gaussian_diffusion, "with noise of its own")
alone = accelerate(gaussian_diffusion, noise="philox", seed=0, sample_ids=5).sample(model, SIZE, batch_size=1)[-1]
print(f"image 5 drawn alone differs from that in the batch by {np.abs(alone[0] - whole[5]).max():.1e} at most")
