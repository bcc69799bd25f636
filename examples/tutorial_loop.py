"""The tutorial's sampling loop before and after one line: the same images, with one launch a step.

Your notebook's GaussianDiffusion takes the place of the class below. `accelerate` recognises it by the names and the
parameters of its methods, and compares each method with the fused one before it replaces any.
"""

import copy
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ddpm_ext import accelerate

TIMESTEPS, BATCH, SIZE = 200, 16, 32


class GaussianDiffusion:
    """The steps of Ho et al. 2020 as the tutorial has them: a linear schedule, and a model that predicts the noise."""

    def __init__(self, timesteps: int) -> None:
        self.timesteps = timesteps
        betas = torch.linspace(0.1 / timesteps, 20 / timesteps, timesteps, dtype=torch.float64)
        alphas_cumprod = torch.cumprod(1 - betas, 0)
        before = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
        variance = betas * (1 - before) / (1 - alphas_cumprod)
        self.sqrt_alphas_cumprod = alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - alphas_cumprod).sqrt()
        self.sqrt_recip_alphas_cumprod = (1 / alphas_cumprod).sqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / alphas_cumprod - 1).sqrt()
        self.posterior_log_variance_clipped = variance.clamp(min=1e-20).log()
        self.posterior_mean_coef1 = betas * before.sqrt() / (1 - alphas_cumprod)
        self.posterior_mean_coef2 = (1 - before) * (1 - betas).sqrt() / (1 - alphas_cumprod)

    def _extract(self, table, t, x):
        return table.to(t.device).gather(0, t).float().view(-1, *[1] * (x.dim() - 1))

    def q_sample(self, x_start, t, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        scaled = self._extract(self.sqrt_alphas_cumprod, t, x_start) * x_start
        return scaled + self._extract(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise

    def p_mean_variance(self, model, x_t, t, clip_denoised=True):
        x_start = self._extract(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t
        x_start = x_start - self._extract(self.sqrt_recipm1_alphas_cumprod, t, x_t) * model(x_t, t)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        mean = self._extract(self.posterior_mean_coef1, t, x_t) * x_start
        mean = mean + self._extract(self.posterior_mean_coef2, t, x_t) * x_t
        return mean, self._extract(self.posterior_log_variance_clipped, t, x_t)

    @torch.no_grad()
    def p_sample(self, model, x_t, t, clip_denoised=True):
        mean, log_variance = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised)
        noise = torch.randn_like(x_t)
        has_noise = (t != 0).float().view(-1, *[1] * (x_t.dim() - 1))
        return mean + has_noise * (0.5 * log_variance).exp() * noise

    @torch.no_grad()
    def p_sample_loop(self, model, shape):
        device = next(model.parameters()).device
        image, images = torch.randn(shape, device=device), []
        for i in reversed(range(self.timesteps)):
            image = self.p_sample(model, image, torch.full((shape[0],), i, device=device))
            images.append(image.cpu().numpy())
        return images

    def sample(self, model, image_size, batch_size=8, channels=3):
        return self.p_sample_loop(model, (batch_size, channels, image_size, image_size))

    def train_losses(self, model, x_start, t):
        noise = torch.randn_like(x_start)
        return F.mse_loss(noise, model(self.q_sample(x_start, t, noise=noise), t))


class Model(nn.Module):
    """Stands for the U-Net. It is small, so that the time of the loop itself shows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3, 1, 1), 0.5))
        self.time = nn.Embedding(TIMESTEPS, 3)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.scale * x + self.time(t)[:, :, None, None]


def sample(diffusion: GaussianDiffusion, what: str) -> np.ndarray:
    x, t = torch.zeros(BATCH, 3, SIZE, SIZE), torch.zeros(BATCH, dtype=torch.long)
    copy.copy(diffusion).p_sample(model, x, t)  # warms up; a copy counts its samples by itself
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

# With noise="philox" the noise belongs to an image: image 5 of seed 0 is the same in every batch. The first loop has
# the images from 0; a second loop of this object would have those after them.
gaussian_diffusion = accelerate(gaussian_diffusion, noise="philox", seed=0)
whole = sample(gaussian_diffusion, "with noise that belongs to an image")
alone = accelerate(gaussian_diffusion, noise="philox", seed=0, sample_ids=5).sample(model, SIZE, batch_size=1)[-1]
print(f"image 5 drawn alone differs from that in the batch by {np.abs(alone[0] - whole[5]).max():.1e} at most")
