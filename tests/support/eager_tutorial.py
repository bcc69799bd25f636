"""The GaussianDiffusion of a well-known tutorial, in plain torch: the tutorial's names and formulas in new code.

    q(x_t | x_0)            = N(sqrt(abar_t) x_0, 1 - abar_t)                                    Ho et al. 2020, eq. (4)
    q(x_{t-1} | x_t, x_0)   = N(coef1_t x_0 + coef2_t x_t, posterior_variance_t)                 eq. (6), (7)

The tables of coefficients are on the CPU and have the dtype `dtype`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from tqdm.auto import tqdm
except ImportError:

    def tqdm(steps, **_):
        return steps


def linear_beta_schedule(timesteps: int) -> Tensor:
    """Betas in equal steps, from 1e-4 to 0.02 for 1000 timesteps. In general, both ends are times 1000 / timesteps."""
    scale = 1000 / timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64)


def cosine_beta_schedule(timesteps: int, s: float = 0.008) -> Tensor:
    """The betas of the cosine schedule (Nichol & Dhariwal 2021, eq. 17)."""
    moments = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    level = ((moments + s) / (1 + s) * math.pi / 2).cos() ** 2
    return (1 - level[1:] / level[:-1]).clamp(max=0.999)


class GaussianDiffusion:
    def __init__(
        self, timesteps: int = 1000, beta_schedule: str | Tensor = "linear", dtype: torch.dtype = torch.float64
    ) -> None:
        schedules = {"linear": linear_beta_schedule, "cosine": cosine_beta_schedule}
        betas = beta_schedule if isinstance(beta_schedule, Tensor) else schedules[beta_schedule](timesteps)
        self.timesteps = timesteps
        self.betas = betas.to(dtype)
        self.alphas = 1 - self.betas
        alphas_cumprod = self.alphas_cumprod = self.alphas.cumprod(0)
        alphas_cumprod_prev = self.alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=dtype), alphas_cumprod[:-1]])
        self.sqrt_alphas_cumprod = alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - alphas_cumprod).sqrt()
        self.log_one_minus_alphas_cumprod = (1 - alphas_cumprod).log()
        self.sqrt_recip_alphas_cumprod = (1 / alphas_cumprod).sqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / alphas_cumprod - 1).sqrt()
        self.posterior_variance = self.betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        self.posterior_log_variance_clipped = self.posterior_variance.clamp(min=1e-20).log()
        self.posterior_mean_coef1 = self.betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod)
        self.posterior_mean_coef2 = (1 - alphas_cumprod_prev) * self.alphas.sqrt() / (1 - alphas_cumprod)

    def _extract(self, a: Tensor, t: Tensor, x_shape: torch.Size) -> Tensor:
        """a[t] in float32, of shape (batch, 1, ...) with as many dimensions as x."""
        picked = a.to(t.device).gather(0, t).float()
        return picked.view(len(t), *[1] * (len(x_shape) - 1))

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        noise = torch.randn_like(x_start) if noise is None else noise
        signal = self._extract(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
        return signal + self._extract(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * noise

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_start = self._extract(self.posterior_mean_coef1, t, x_t.shape) * x_start
        mean = of_start + self._extract(self.posterior_mean_coef2, t, x_t.shape) * x_t
        variance = self._extract(self.posterior_variance, t, x_t.shape)
        return mean, variance, self._extract(self.posterior_log_variance_clipped, t, x_t.shape)

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        scaled = self._extract(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t
        return scaled - self._extract(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape) * noise

    def p_mean_variance(self, model, x_t: Tensor, t: Tensor, clip_denoised: bool = True):
        x_start = self.predict_start_from_noise(x_t, t, model(x_t, t))
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        return self.q_posterior_mean_variance(x_start, x_t, t)

    @torch.no_grad()
    def p_sample(self, model, x_t: Tensor, t: Tensor, clip_denoised: bool = True) -> Tensor:
        mean, _, log_variance = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised)
        noise = torch.randn_like(x_t)
        noisy = (t != 0).float().view(-1, *[1] * (x_t.dim() - 1))
        return mean + noisy * (0.5 * log_variance).exp() * noise

    @torch.no_grad()
    def p_sample_loop(self, model, shape: tuple[int, ...]) -> list[np.ndarray]:
        device = next(model.parameters()).device
        img = torch.randn(shape, device=device)
        imgs = []
        for i in tqdm(reversed(range(self.timesteps)), desc="sampling loop time step", total=self.timesteps):
            img = self.p_sample(model, img, torch.full((shape[0],), i, device=device, dtype=torch.long))
            imgs.append(img.cpu().numpy())
        return imgs

    @torch.no_grad()
    def sample(self, model, image_size: int, batch_size: int = 8, channels: int = 3) -> list[np.ndarray]:
        return self.p_sample_loop(model, shape=(batch_size, channels, image_size, image_size))

    def train_losses(self, model, x_start: Tensor, t: Tensor) -> Tensor:
        noise = torch.randn_like(x_start)
        x_noisy = self.q_sample(x_start, t, noise=noise)
        return F.mse_loss(noise, model(x_noisy, t))
