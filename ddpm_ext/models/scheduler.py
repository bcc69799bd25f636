"""diffusers' scheduler_config.json, read into what GaussianDiffusion takes and written from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ddpm_ext.diffusion import GaussianDiffusion

__all__ = ["DiffusionSettings", "read_settings"]

_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned": "learned_variance",
    "learned_log": "learned",  # which diffusers doesn't know, and would refuse the channels of
    "learned_range": "learned_range",
}
# Schedulers that share one forward process, so that a model trained with one samples with any other.
_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


@dataclass(frozen=True)
class DiffusionSettings:
    """What a model was trained for: the arguments of GaussianDiffusion."""

    timesteps: int = 1000
    beta_schedule: str | tuple[float, ...] = "linear"
    """a name that GaussianDiffusion knows, or the betas themselves"""
    prediction: str = "eps"
    variance: str = "fixed_small"

    def diffusion(self, backend: str = "fused") -> GaussianDiffusion:
        """The diffusion, whose steps `backend` ("fused" or "reference") takes."""
        from ddpm_ext.diffusion import GaussianDiffusion

        schedule = self.beta_schedule
        return GaussianDiffusion(
            self.timesteps,
            schedule if isinstance(schedule, str) else torch.tensor(schedule, dtype=torch.float64),
            prediction=self.prediction,
            variance=self.variance,
            backend=backend,
        )

    def to_scheduler_config(self) -> dict[str, Any]:
        """The same as a DDPMScheduler's configuration."""
        config: dict[str, Any] = {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": self.timesteps,
            "prediction_type": next(theirs for theirs, ours in _PREDICTIONS.items() if ours == self.prediction),
            "variance_type": next(theirs for theirs, ours in _VARIANCES.items() if ours == self.variance),
            "clip_sample": True,
            "clip_sample_range": 1.0,
        }
        if self.beta_schedule == "linear":
            # The tutorial's ends, which hold for 1,000 steps, scaled to another number of them.
            scale = 1000 / self.timesteps
            return config | {"beta_schedule": "linear", "beta_start": 1e-4 * scale, "beta_end": 0.02 * scale}
        return config | {"beta_schedule": "linear", "trained_betas": self.diffusion().betas.tolist()}


def read_settings(config: dict[str, Any], name: str) -> DiffusionSettings:
    """The settings in a diffusers scheduler's configuration, whose missing entries have diffusers' defaults.

    Which timesteps a shorter loop visits (timestep_spacing, steps_offset) is the sampler's choice and not read here.

    Raises ValueError, naming `name`, for what we can't sample.
    """
    kind = config.get("_class_name", "DDPMScheduler")
    if kind not in _SCHEDULERS:
        raise ValueError(f"model: {name} is for a {kind}, expected one of {', '.join(_SCHEDULERS)}")
    if config.get("thresholding", False):
        raise ValueError(f"model: {name} asks for dynamic thresholding, which is not supported yet")
    if kind != "PNDMScheduler" and not config.get("clip_sample", True):
        raise ValueError(f"model: {name} has clip_sample false, which is not supported yet; expected true")
    if config.get("clip_sample_range", 1.0) != 1.0:
        raise ValueError(f"model: {name} has clip_sample_range {config['clip_sample_range']}, expected 1.0")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise ValueError(f"model: {name} has prediction_type {prediction!r}, expected one of {', '.join(_PREDICTIONS)}")
    variance = config.get("variance_type", "fixed_small")
    if variance not in _VARIANCES:
        raise ValueError(f"model: {name} has variance_type {variance!r}, expected one of {', '.join(_VARIANCES)}")
    schedule, count = config.get("beta_schedule", "linear"), config.get("num_train_timesteps", 1000)
    if schedule not in _SCHEDULES and config.get("trained_betas") is None:
        raise ValueError(f"model: {name} has beta_schedule {schedule!r}, expected one of {', '.join(_SCHEDULES)}")
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"model: {name} has num_train_timesteps {count!r}, expected a positive number")
    try:
        betas = _betas(config, schedule, count)
    except (TypeError, RuntimeError, OverflowError, ValueError) as error:
        raise ValueError(f"model: {name} has a schedule that can't be read ({error})") from error
    if not len(betas) or not bool(((betas > 0) & (betas <= 1)).all()):
        raise ValueError(f"model: {name} makes betas outside (0, 1]")
    return DiffusionSettings(len(betas), tuple(betas.tolist()), _PREDICTIONS[prediction], _VARIANCES[variance])


def _betas(config: dict[str, Any], schedule: str, count: int) -> Tensor:
    """(timesteps,) float64; diffusers computes the same in float32"""
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64).flatten()
    elif schedule == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    elif schedule == "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, eq. (17), capped at 0.999
        grid = torch.arange(count + 1, dtype=torch.float64) / count
        kept = torch.cos((grid + 0.008) / 1.008 * (math.pi / 2)) ** 2
        betas = (1 - kept[1:] / kept[:-1]).clamp(max=0.999)
    else:  # sigmoid
        betas = torch.sigmoid(torch.linspace(-6, 6, count, dtype=torch.float64)) * (end - start) + start
    return _zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr", False) else betas


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    """The schedule shifted and scaled so that nothing is left of the image at the last step.

    Algorithm 1 of Lin et al. 2023, https://arxiv.org/abs/2305.08891
    """
    root = torch.cumprod(1 - betas, 0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    kept = root**2
    return 1 - torch.cat([kept[:1], kept[1:] / kept[:-1]])
