"""The GaussianDiffusion of eager_tutorial in float64, also with predictions of x0 and v and with the large variance.

It computes on the CPU, whatever the device of its arguments. Tests use its results as the correct ones, so it imports
nothing from ddpm_ext.
"""

import torch
from support import eager_tutorial
from support.eager_tutorial import linear_beta_schedule as linear_betas
from torch import Tensor

__all__ = ["ATTRIBUTES", "Tutorial", "linear_betas"]
ATTRIBUTES = [name for name, table in vars(eager_tutorial.GaussianDiffusion()).items() if isinstance(table, Tensor)]


def wide(*tensors):
    """The tensors on the CPU, with float64 in place of other float dtypes."""
    return [x.double().cpu() if x.is_floating_point() else x.cpu() for x in tensors]


class Tutorial(eager_tutorial.GaussianDiffusion):
    """Samples, noise and model outputs may have any float dtype and any device. Results are float64 on the CPU."""

    def __init__(self, betas: Tensor, prediction: str = "eps", variance: str = "fixed_small"):
        super().__init__(len(betas), betas.cpu())
        self.prediction, self.variance = prediction, variance

    def _extract(self, a, t, x_shape):
        return a[t.cpu()].reshape(-1, *[1] * (len(x_shape) - 1))

    def q_sample(self, x_start, t, noise):
        return super().q_sample(*wide(x_start, t, noise))

    def q_mean_variance(self, x_start, t):
        (x,) = wide(x_start)
        tables = self.sqrt_alphas_cumprod, 1 - self.alphas_cumprod, self.log_one_minus_alphas_cumprod
        signal, variance, log_variance = (self._extract(table, t, x.shape) for table in tables)
        return signal * x, variance, log_variance

    def q_posterior_mean_variance(self, x_start, x_t, t):
        return super().q_posterior_mean_variance(*wide(x_start, x_t, t))

    def predict_start_from_noise(self, x_t, t, noise):
        return super().predict_start_from_noise(*wide(x_t, t, noise))

    def rotated(self, x, y, t):
        """sqrt(abar_t) x - sqrt(1 - abar_t) y. For x = noise and y = x_0 it is v; for x = x_t and y = v it is x_0."""
        return self.q_sample(x, t, -y)

    def predict_start(self, x_t, t, model_output):
        """The x_0 that follows from the model's output."""
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
        if self.variance == "fixed_large":  # beta_t; at t = 0, which adds no noise, the small variance of t = 1
            large = torch.cat([self.posterior_variance[1:2], self.betas[1:]])
            variance = self._extract(large, t, x_t.shape)
            log_variance = variance.log()
        return mean, variance, log_variance

    def p_sample(self, model, x_t, t, clip_denoised=True, *, noise):
        mean, _, log_variance = self.p_mean_variance(model, x_t, t, clip_denoised)
        moving = (t.cpu() != 0).double().reshape(-1, *[1] * (x_t.dim() - 1))
        return mean + moving * (0.5 * log_variance).exp() * noise.double().cpu()

    def train_losses(self, model, x_start, t, *, noise):
        t = t.cpu()
        x_t = self.q_sample(x_start, t, noise)
        return ((model(x_t, t).double() - self.target(x_start, t, noise)) ** 2).mean()
