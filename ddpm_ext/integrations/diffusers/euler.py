"""diffusers' EulerDiscreteScheduler and EulerAncestralDiscreteScheduler.

Their samples are data and noise of sigma, x / sqrt(alphas_cumprod) of those that the rows of samplers.py are for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_ext.integrations.diffusers.forward import affine
from ddpm_ext.integrations.diffusers.scheduler import PREDICTIONS, Plan, Scheduler, imported, odd, plan_of, tensors
from ddpm_ext.integrations.registry import Support
from ddpm_ext.tables.on_device import DeviceTables
from ddpm_ext.tables.samplers import euler, euler_ancestral
from ddpm_ext.tables.spacing import Jumps
from ddpm_ext.tables.step_table import StepTable

__all__ = ["SUPPORT", "EulerAncestralDiscrete", "EulerDiscrete"]

SUPPORT = (
    Support(
        "EulerDiscreteScheduler",
        "step",
        "every prediction_type; all sigmas and timesteps; float32 inside, as there",
        "s_churn above 0; sigmas below 1e-4 before the last; without scale_model_input; float64; gradients",
    ),
    Support(
        "EulerDiscreteScheduler",
        "add_noise",
        "float32, float16, bfloat16; gradients",
        "float64; samples that are broadcast",
    ),
    Support("EulerDiscreteScheduler", "scale_model_input", "one launch, as there, by a number that is kept", ""),
    Support("EulerDiscreteScheduler", "get_velocity", "", "always"),
    Support(
        "EulerAncestralDiscreteScheduler",
        "step",
        "epsilon, v_prediction; all sigmas that fall",
        "sigmas below 1e-4 before the last; without scale_model_input; float64; gradients",
    ),
    Support(
        "EulerAncestralDiscreteScheduler",
        "add_noise",
        "float32, float16, bfloat16; gradients",
        "float64; samples that are broadcast",
    ),
    Support(
        "EulerAncestralDiscreteScheduler", "scale_model_input", "one launch, as there, by a number that is kept", ""
    ),
)


def _plan(sigmas: Tensor, timesteps: Tensor, prediction_type: str, ancestral: bool) -> Plan:
    """Row i goes from sigmas[i] to the next one."""
    prediction = PREDICTIONS.get("sample" if prediction_type == "original_sample" else prediction_type)
    if prediction is None or (ancestral and prediction == "x0"):
        return Plan()
    sigma = sigmas.detach().to("cpu", torch.float64)
    if (why := odd(sigma)) is not None:
        return Plan(why=why)
    if ancestral and not (sigma[1:] <= sigma[:-1]).all():
        return Plan(why="its sigmas do not fall")
    kept = 1 / (1 + sigma**2)
    now, after = kept[:-1], kept[1:]
    t = timesteps.detach().cpu()
    grid = Jumps(torch.arange(len(now)), now, after, now / after)
    steps = (euler_ancestral if ancestral else euler)(grid, prediction=prediction)
    # the same noise as of a loop in ddpm_ext: by the timestep, or by the row between timesteps
    whole = len(t) == len(now) and bool((t == t.round()).all()) and bool((t >= 0).all()) and len(t.unique()) == len(t)
    return plan_of(_of_sigma(steps, t.long() if whole else grid.timestep), None)


def _of_sigma(steps: StepTable, draw: Tensor) -> StepTable:
    """For samples that are divided by sqrt(alphas_cumprod), where a row starts and where it arrives."""
    before, to = steps.now.sqrt(), 1 / steps.after.sqrt()
    return StepTable(
        steps.timestep,
        a=steps.a * before,
        b=steps.b,
        c0=steps.c0 * to,
        c1=steps.c1 * before * to,
        s=steps.s * to,
        draw=draw,
        now=steps.now,
        after=steps.after,
    )


def _scales(sigmas: Tensor) -> Plan:
    return Plan(scales=((sigmas.detach() ** 2 + 1) ** 0.5).unbind(0))


def _forward(sigmas: Tensor) -> Plan:
    sigma = sigmas.detach().to("cpu", torch.float64)
    return Plan(tables=DeviceTables(add_noise=torch.stack([torch.ones_like(sigma), sigma], 1)))


class _Euler(Scheduler):
    ancestral: bool
    sigmas: Tensor
    is_scale_input_called: bool
    step_index: int | None
    begin_index: int | None
    _step_index: int

    def _euler(self, model_output: Any, timestep: Any, sample: Any, generator: Any) -> tuple[Tensor, Tensor] | None:
        integers = isinstance(timestep, int | torch.IntTensor | torch.LongTensor)
        if integers or not tensors(sample, model_output):
            return None
        if not self.is_scale_input_called:
            return self._aside("step", "scale_model_input was not called")  # of which it warns, too
        if not isinstance(self.sigmas, Tensor):
            return self._aside("step", "its sigmas are no tensor")
        plan = self._plan(_plan, self.sigmas, self.timesteps, self.config.prediction_type, self.ancestral)
        if plan.tables is None:
            return self._aside("step", plan.why)
        why = self._misfit(sample, model_output)
        if why is not None:
            return self._aside("step", why)
        if self.step_index is None:
            self._init_step_index(timestep)  # type: ignore[attr-defined]
        row = self._step_index
        if not 0 <= row < len(self.sigmas) - 1:
            return None
        sample = sample.to(torch.float32)
        noise = self._noise(self.ancestral, model_output, generator, sample)
        prev_sample, x0 = self._take(plan, row, sample, model_output, noise)
        self._step_index += 1
        if self.config.prediction_type in ("sample", "original_sample"):
            x0 = model_output
        return prev_sample.to(model_output.dtype), x0

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        if not isinstance(self.sigmas, Tensor):
            return super().scale_model_input(sample, timestep)
        if self.step_index is None:
            self._init_step_index(timestep)  # type: ignore[attr-defined]
        scales = self._plan(_scales, self.sigmas).scales
        self.is_scale_input_called = True
        return sample / scales[self._step_index]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        noisy = self._add_noise(original_samples, noise, timesteps)
        return super().add_noise(original_samples, noise, timesteps) if noisy is None else noisy  # type: ignore[misc]

    def _add_noise(self, original_samples: Any, noise: Any, timesteps: Any) -> Tensor | None:
        if not isinstance(timesteps, Tensor) or timesteps.dim() != 1:
            return None
        if self.begin_index is None:
            own = self.timesteps.to(timesteps.device)
            rows = [self.index_for_timestep(t, own) for t in timesteps]  # type: ignore[attr-defined]
        else:
            rows = [self.begin_index if self.step_index is None else self.step_index] * len(timesteps)
        tables = self._plan(_forward, self.sigmas).tables
        assert tables is not None
        return affine(
            self,
            "add_noise",
            original_samples,
            noise,
            lambda device: tables.get("add_noise", device, torch.float32),
            torch.tensor(rows),
        )


class EulerDiscrete(_Euler):
    """Before EulerDiscreteScheduler."""

    replaces = ("step", "add_noise", "scale_model_input")
    relies_on = ("_init_step_index", "index_for_timestep")
    ancestral = False

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        if s_churn > 0:
            done = self._aside("step", "s_churn adds noise")
        else:
            done = self._euler(model_output, timestep, sample, generator)
        if done is None:
            return super().step(  # type: ignore[misc]
                model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, return_dict
            )
        if not return_dict:
            return done
        return imported("schedulers.scheduling_euler_discrete", "EulerDiscreteSchedulerOutput")(*done)


class EulerAncestralDiscrete(_Euler):
    """Before EulerAncestralDiscreteScheduler."""

    replaces = ("step", "add_noise", "scale_model_input")
    relies_on = ("_init_step_index", "index_for_timestep")
    ancestral = True

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        done = self._euler(model_output, timestep, sample, generator)
        if done is None:
            return super().step(model_output, timestep, sample, generator, return_dict)  # type: ignore[misc]
        if not return_dict:
            return done
        return imported("schedulers.scheduling_euler_ancestral_discrete", "EulerAncestralDiscreteSchedulerOutput")(
            *done
        )
