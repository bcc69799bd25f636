"""The diffusion's formulas as they are commonly written in eager torch, for comparison with the fused kernels.

Coefficients are gathered by t, each term is a separate operator, and the noise comes from torch's generator.
"""

from __future__ import annotations

import torch
from torch import Tensor


class EagerDiffusion:
    """The forward and the reverse step of Ho et al. 2020, with a linear schedule, for a model that predicts the noise.

    The variance of a reverse step is the posterior's.
    """

    def __init__(self, timesteps: int = 1000) -> None:
        scale = 1000 / timesteps
        betas = torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64, device="cpu")
        alphas_cumprod = torch.cumprod(1 - betas, 0)
        alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), alphas_cumprod[:-1]])
        variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        # In common code the tables are float64 on the CPU and are copied to t's device in each step.
        self.sqrt_alphas_cumprod = alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - alphas_cumprod).sqrt()
        self.sqrt_recip_alphas_cumprod = (1 / alphas_cumprod).sqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / alphas_cumprod - 1).sqrt()
        self.posterior_log_variance_clipped = variance.clamp(min=1e-20).log()
        self.posterior_mean_coef1 = betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod)
        self.posterior_mean_coef2 = (1 - alphas_cumprod_prev) * (1 - betas).sqrt() / (1 - alphas_cumprod)

    @staticmethod
    def extract(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """The entries of a table at t, (batch,) int64, in a shape that broadcasts with `like`, (batch, ...)."""
        return table.to(t.device).gather(0, t).float().reshape(len(t), *(1,) * (like.dim() - 1))

    def q_sample(self, x_start: Tensor, t: Tensor) -> Tensor:
        """x_t from x_0, eq. (4), of x_start's shape (batch, ...)."""
        noise = torch.randn_like(x_start)
        return (
            self.extract(self.sqrt_alphas_cumprod, t, x_start) * x_start
            + self.extract(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise
        )

    def p_sample(self, predicted_noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x_{t-1} from x_t and the model's output, both (batch, ...): eqs. (6), (7) and (11).

        The predicted x_0 is clipped to [-1, 1].
        """
        start = (
            self.extract(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t
            - self.extract(self.sqrt_recipm1_alphas_cumprod, t, x_t) * predicted_noise
        )
        start = torch.clamp(start, min=-1.0, max=1.0)
        mean = (
            self.extract(self.posterior_mean_coef1, t, x_t) * start
            + self.extract(self.posterior_mean_coef2, t, x_t) * x_t
        )
        log_variance = self.extract(self.posterior_log_variance_clipped, t, x_t)
        noise = torch.randn_like(x_t)
        adds_noise = (t != 0).float().view(-1, *(1,) * (x_t.dim() - 1))
        return mean + adds_noise * (0.5 * log_variance).exp() * noise
