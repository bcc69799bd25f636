"""Converts diffusers' scheduler_config.json to the arguments of GaussianDiffusion, and these to a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.tables import schedules
from ddpm_ext.tables.predictions import peer_predictions
from ddpm_ext.tables.variances import peer_variances

# {diffusers' name: the name in GaussianDiffusion}
_PREDICTIONS = peer_predictions("diffusers")
_VARIANCES = peer_variances("diffusers")
# Schedulers with the same forward process: a model that was trained with one of them can be sampled with any of them.
_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
# The scheduler of rectified flow, for which beta_schedule and prediction are "flow". Entries of its configuration with
# values other than those in _FLOW_DEFAULTS would change the noise levels or the sampling, so they are refused.
_FLOW = "FlowMatchEulerDiscreteScheduler"
_FLOW_DEFAULTS = {
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
}
# Entries that affect only the loop, not the diffusion: (entry, the value that it must have, the clip_denoised of a loop
# that has the effect of another value, for the error about that value).
_LOOP_ENTRIES: tuple[tuple[str, object, str], ...] = (
    ("thresholding", False, "DynamicThreshold(...)"),
    ("clip_sample_range", 1.0, "(low, high)"),
)
_MOST_TIMESTEPS = 1_000_000


@dataclass(frozen=True)
class DiffusionSettings:
    """The diffusion that a model was trained for, as arguments of GaussianDiffusion.

    beta_schedule: the name of one of GaussianDiffusion's schedules, or the betas.
    """

    timesteps: int = 1000
    beta_schedule: str | tuple[float, ...] = "linear"
    prediction: str = "eps"
    variance: str = "fixed_small"

    def __repr__(self) -> str:
        betas = self.beta_schedule
        schedule = repr(betas) if isinstance(betas, str) else f"<{len(betas)} betas, {betas[0]:.3g} to {betas[-1]:.3g}>"
        return (
            f"DiffusionSettings(timesteps={self.timesteps}, beta_schedule={schedule}, prediction={self.prediction!r}, "
            f"variance={self.variance!r})"
        )

    @classmethod
    def of(cls, diffusion: GaussianDiffusion) -> DiffusionSettings:
        """The settings of a GaussianDiffusion. Raises ValueError if it has a NoiseSchedule other than "flow"."""
        schedule, timesteps = diffusion.schedule, diffusion.timesteps
        betas: str | tuple[float, ...] = tuple(diffusion.betas.tolist())
        if schedule.scale is not None:
            flow = schedules.forward_levels("flow", timesteps)
            if not (schedule.signal.equal(flow.signal) and schedule.noise.equal(flow.noise)):
                raise ValueError("diffusion has a NoiseSchedule, expected a schedule of betas or 'flow'")
            betas = "flow"
        return cls(timesteps, betas, diffusion.prediction, diffusion.variance)

    def diffusion(self, backend: str = "fused") -> GaussianDiffusion:
        """Makes the diffusion; `backend` is "fused" or "reference", as in GaussianDiffusion."""
        schedule = self.beta_schedule
        return GaussianDiffusion(
            self.timesteps,
            schedule if isinstance(schedule, str) else torch.tensor(schedule, dtype=torch.float64, device="cpu"),
            prediction=self.prediction,
            variance=self.variance,
            backend=backend,
        )

    def to_scheduler_config(self, *, clip: bool = True) -> dict[str, Any]:
        """The configuration of diffusers' DDPMScheduler, or for "flow" FlowMatchEulerDiscreteScheduler, as a dict.

        clip: whether samples are in [-1, 1].

        Raises:
            ValueError: diffusers has no scheduler for the prediction and the schedule.
        """
        variance = next(theirs for theirs, ours in _VARIANCES.items() if ours == self.variance)
        if "flow" in (self.beta_schedule, self.prediction):
            if (self.beta_schedule, self.prediction) != ("flow", "flow"):
                raise ValueError(
                    f"prediction is {self.prediction!r}, expected 'flow' with beta_schedule 'flow' and with no "
                    "other: diffusers has no scheduler for one of them alone"
                )
            return {
                "_class_name": _FLOW,
                "num_train_timesteps": self.timesteps,
                "shift": 1.0,
                **({} if variance == "fixed_small" else {"variance_type": variance}),
                **({} if clip else {"clip_sample": False}),
            }
        if self.prediction not in _PREDICTIONS.values():
            raise ValueError(f"prediction is {self.prediction!r}, expected one of {', '.join(_PREDICTIONS.values())}")
        config: dict[str, Any] = {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": self.timesteps,
            "prediction_type": next(theirs for theirs, ours in _PREDICTIONS.items() if ours == self.prediction),
            "variance_type": variance,
            "clip_sample": clip,
            "clip_sample_range": 1.0,
        }
        if self.beta_schedule == "linear":
            # The first and the last beta for 1,000 timesteps, scaled to this number of timesteps, as in
            # tables.schedules.
            scale = 1000 / self.timesteps
            return config | {"beta_schedule": "linear", "beta_start": 1e-4 * scale, "beta_end": 0.02 * scale}
        return config | {"beta_schedule": "linear", "trained_betas": self.diffusion().betas.tolist()}


def read_settings(config: dict[str, Any], name: str) -> DiffusionSettings:
    """Reads the settings from a diffusers scheduler's configuration; missing entries have diffusers' defaults.

    timestep_spacing and steps_offset are not read, since p_sample_loop's options choose the timesteps of a loop.

    Raises:
        ValueError: the scheduler's class is not supported, an entry is damaged, or GaussianDiffusion does not support
            its value. The message names `name`.
    """
    kind = config.get("_class_name", "DDPMScheduler")
    if kind == _FLOW:
        return _read_flow(config, name)
    if kind not in _SCHEDULERS:
        raise ValueError(f"model: {name} is for a {kind}, expected one of {', '.join((*_SCHEDULERS, _FLOW))}")
    for entry, value, instead in _LOOP_ENTRIES:
        actual = config.get(entry, value)
        if actual != value:
            raise ValueError(
                f"model: {name} has {entry} {actual!r}, expected {value!r}; pass clip_denoised={instead} to "
                "p_sample_loop instead"
            )
    prediction = _translated(config, name, "prediction_type", "epsilon", _PREDICTIONS)
    variance, schedule = _variance(config, name), config.get("beta_schedule", "linear")
    if schedule not in _SCHEDULES and config.get("trained_betas") is None:
        raise ValueError(f"model: {name} has beta_schedule {schedule!r}, expected one of {', '.join(_SCHEDULES)}")
    count = _count(config, name)
    try:
        betas = _betas(config, schedule, count)
    except (TypeError, RuntimeError, OverflowError, ValueError) as error:
        raise ValueError(f"model: {name} has a schedule that can't be read ({error})") from error
    if not len(betas) or not bool(((betas > 0) & (betas <= 1)).all()):
        raise ValueError(f"model: {name} makes betas outside (0, 1]")
    return DiffusionSettings(len(betas), tuple(betas.tolist()), prediction, variance)


def clips(config: dict[str, Any], name: str, *, default: bool = True) -> bool:
    """Whether samples are in [-1, 1], by clip_sample in a scheduler's configuration.

    Without clip_sample, and for PNDMScheduler, `default`. Raises ValueError, naming `name`, if the entry is damaged.
    """
    clip = config.get("clip_sample", default)
    if not isinstance(clip, bool):
        raise ValueError(f"model: {name} has clip_sample {clip!r}, expected true or false")
    # diffusers' PNDMScheduler ignores clip_sample.
    return default if config.get("_class_name") == "PNDMScheduler" else clip


def _read_flow(config: dict[str, Any], name: str) -> DiffusionSettings:
    for entry, value in _FLOW_DEFAULTS.items():
        if config.get(entry, value) != value:
            raise ValueError(f"model: {name} has {entry} {config[entry]!r}, expected {value!r}")
    return DiffusionSettings(_count(config, name), "flow", "flow", _variance(config, name))


def _count(config: dict[str, Any], name: str) -> int:
    count = config.get("num_train_timesteps", 1000)
    if not isinstance(count, int) or not 1 <= count <= _MOST_TIMESTEPS:
        raise ValueError(f"model: {name} has num_train_timesteps {count!r}, expected 1 to {_MOST_TIMESTEPS}")
    return count


def _variance(config: dict[str, Any], name: str) -> str:
    return _translated(config, name, "variance_type", "fixed_small", _VARIANCES)


def _translated(config: dict[str, Any], name: str, entry: str, default: str, known: dict[str, str]) -> str:
    theirs = config.get(entry, default)
    if theirs not in tuple(known):
        raise ValueError(f"model: {name} has {entry} {theirs!r}, expected one of {', '.join(known)}")
    return known[theirs]


def _betas(config: dict[str, Any], schedule: str, count: int) -> Tensor:
    """The betas of a configuration, (timesteps,) float64. diffusers' are equal up to rounding to float32."""
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64, device="cpu").flatten()
    elif schedule == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64, device="cpu")
    elif schedule == "scaled_linear":
        betas = schedules.scaled_linear(count, start, end)
    elif schedule == "squaredcos_cap_v2":
        betas = schedules.cosine_betas(torch.arange(count + 1, dtype=torch.float64, device="cpu") / count)
    else:
        # In diffusers' "sigmoid" the betas follow a sigmoid; in GaussianDiffusion's, alphas_cumprod does.
        betas = torch.sigmoid(torch.linspace(-6, 6, count, dtype=torch.float64, device="cpu")) * (end - start) + start
    return schedules.rescale_zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr", False) else betas
