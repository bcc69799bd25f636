"""The tutorial's GaussianDiffusion in float64, with x0- and v-predictions and the large variance added.

It computes on the CPU, wherever its arguments lie. The tests take its results for the truth, so that it imports nothing
from ddpm_ext.
"""

import torch
from torch import Tensor

ATTRIBUTES = (
    "betas",
    "alphas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


def linear_betas(timesteps: int) -> Tensor:
    i = torch.arange(timesteps, dtype=torch.float64)
    return 1000 / timesteps * (1e-4 + (0.02 - 1e-4) * i / (timesteps - 1))


class Tutorial:
    """Samples, noise and model outputs may have any float dtype and any device. Results are float64 on the CPU."""

    def __init__(self, betas: Tensor, prediction: str = "eps", variance: str = "fixed_small"):
        self.prediction, self.variance = prediction, variance
        self.betas = betas.double().cpu()
        self.alphas = 1 - self.betas
        self.alphas_cumprod = torch.stack([self.alphas[: i + 1].prod() for i in range(len(betas))])
        before = self.alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        kept, lost = self.alphas_cumprod, 1 - self.alphas_cumprod
        self.sqrt_alphas_cumprod = kept**0.5
        self.sqrt_one_minus_alphas_cumprod = lost**0.5
        self.log_one_minus_alphas_cumprod = torch.log(lost)
        self.sqrt_recip_alphas_cumprod = kept**-0.5
        self.sqrt_recipm1_alphas_cumprod = (lost / kept) ** 0.5
        self.posterior_variance = (1 - before) / lost * self.betas
        self.posterior_log_variance_clipped = torch.log(self.posterior_variance.clamp(min=1e-20))
        self.posterior_mean_coef1 = before**0.5 * self.betas / lost
        self.posterior_mean_coef2 = self.alphas**0.5 * (1 - before) / lost

    def at(self, values: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return values[t.cpu()].reshape(-1, *[1] * (x.dim() - 1))

    def affine(self, k0: Tensor, x: Tensor, k1: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """k0_t x + k1_t y"""
        return self.at(k0, t, x) * x.double().cpu() + self.at(k1, t, y) * y.double().cpu()

    def q_sample(self, x_start, t, noise):
        return self.affine(self.sqrt_alphas_cumprod, x_start, self.sqrt_one_minus_alphas_cumprod, noise, t)

    def q_mean_variance(self, x_start, t):
        mean = self.at(self.sqrt_alphas_cumprod, t, x_start) * x_start.double().cpu()
        variance = self.at(1 - self.alphas_cumprod, t, x_start)
        return mean, variance, self.at(self.log_one_minus_alphas_cumprod, t, x_start)

    def q_posterior_mean_variance(self, x_start, x_t, t):
        mean = self.affine(self.posterior_mean_coef1, x_start, self.posterior_mean_coef2, x_t, t)
        variance = self.at(self.posterior_variance, t, x_t)
        return mean, variance, self.at(self.posterior_log_variance_clipped, t, x_t)

    def predict_start_from_noise(self, x_t, t, noise):
        return self.affine(self.sqrt_recip_alphas_cumprod, x_t, -self.sqrt_recipm1_alphas_cumprod, noise, t)

    def rotated(self, x, y, t):
        """sqrt(abar_t) x - sqrt(1 - abar_t) y: v of noise and x_0, and x_0 of x_t and v."""
        return self.affine(self.sqrt_alphas_cumprod, x, -self.sqrt_one_minus_alphas_cumprod, y, t)

    def predict_start(self, x_t, t, model_output):
        """x_0 from what the model predicts."""
        if self.prediction == "x0":
            return model_output.double().cpu()
        if self.prediction == "v":
            return self.rotated(x_t, model_output, t)
        return self.predict_start_from_noise(x_t, t, model_output)

    def target(self, x_start, t, noise):
        """The target of the model's training."""
        if self.prediction == "v":
            return self.rotated(noise, x_start, t)
        return (x_start if self.prediction == "x0" else noise).double().cpu()

    def p_mean_variance(self, model, x_t, t, clip_denoised=True):
        x_recon = self.predict_start(x_t, t, model(x_t, t))
        if clip_denoised:
            x_recon = torch.clamp(x_recon, min=-1.0, max=1.0)
        mean, variance, log_variance = self.q_posterior_mean_variance(x_recon, x_t, t)
        if self.variance == "fixed_large":  # beta, but at t = 0, where no noise is added, the small variance of t = 1
            large = torch.cat([self.posterior_variance[1:2], self.betas[1:]])
            variance = self.at(large, t, x_t)
            log_variance = variance.log()
        return mean, variance, log_variance

    def p_sample(self, model, x_t, t, clip_denoised=True, *, noise):
        mean, _, log_variance = self.p_mean_variance(model, x_t, t, clip_denoised)
        moving = self.at((torch.arange(len(self.betas)) != 0).double(), t, x_t)
        return mean + moving * (0.5 * log_variance).exp() * noise.double().cpu()

    def train_losses(self, model, x_start, t, *, noise):
        t = t.cpu()
        x_t = self.q_sample(x_start, t, noise)
        return ((model(x_t, t).double() - self.target(x_start, t, noise)) ** 2).mean()
