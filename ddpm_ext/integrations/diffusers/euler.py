"""diffusers' EulerDiscreteScheduler and EulerAncestralDiscreteScheduler.

Their samples are data plus noise of standard deviation sigma: x / sqrt(alphas_cumprod) of the samples x that the rows
of ddpm_ext's samplers are for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_ext.integrations.diffusers.forward import weighted_sum
from ddpm_ext.integrations.diffusers.scheduler import (
    PREDICTIONS,
    FusedRows,
    Scheduler,
    alphas_cumprod_of,
    are_tensors,
    imported,
    make_rows,
)
from ddpm_ext.integrations.fallback import Fallback, with_fallback
from ddpm_ext.integrations.shared import Support
from ddpm_ext.tables.on_device import DeviceTables
from ddpm_ext.tables.samplers import euler, euler_ancestral
from ddpm_ext.tables.spacing import Jumps
from ddpm_ext.tables.step_table import StepTable

__all__ = ["SUPPORT", "EulerAncestralDiscrete", "EulerDiscrete"]

SUPPORT = (
    Support(
        "EulerDiscreteScheduler",
        "step",
        "every prediction_type; all sigmas and timesteps; computed in float32, as diffusers does",
        "s_churn above 0; sigmas below 1e-4 before the last; without scale_model_input; float64; gradients",
    ),
    Support(
        "EulerDiscreteScheduler",
        "add_noise",
        "float32, float16, bfloat16; gradients",
        "float64; samples that are broadcast",
    ),
    Support("EulerDiscreteScheduler", "scale_model_input", "one launch, as in diffusers, by a cached number", ""),
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
        "EulerAncestralDiscreteScheduler", "scale_model_input", "one launch, as in diffusers, by a cached number", ""
    ),
)


def _make(sigmas: Tensor, timesteps: Tensor, prediction_type: str, ancestral: bool) -> FusedRows:
    """Row i goes from sigmas[i] to the next one."""
    prediction = PREDICTIONS.get("sample" if prediction_type == "original_sample" else prediction_type)
    if prediction is None or (ancestral and prediction == "x0"):
        raise Fallback
    levels = alphas_cumprod_of(sigmas)
    if ancestral and not (sigmas[1:] <= sigmas[:-1]).all():
        raise Fallback("its sigmas do not fall")
    now, after = levels[:-1], levels[1:]
    t = timesteps.detach().cpu()
    grid = Jumps(torch.arange(len(now), device="cpu"), now, after, now / after)
    steps = (euler_ancestral if ancestral else euler)(grid, prediction=prediction)
    # A loop of ddpm_ext draws the same noise: by the timestep, or by the row where timesteps are fractional.
    whole = len(t) == len(now) and bool((t == t.round()).all()) and bool((t >= 0).all()) and len(t.unique()) == len(t)
    return make_rows(_for_unscaled_samples(steps, t.long() if whole else grid.timestep), None)


def _for_unscaled_samples(steps: StepTable, draw: Tensor) -> StepTable:
    """The steps for samples that are divided by sqrt(alphas_cumprod), where a row starts and where it arrives."""
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


def _input_scales(sigmas: Tensor) -> FusedRows:
    return FusedRows(scales=((sigmas.detach() ** 2 + 1) ** 0.5).unbind(0))


def _forward(sigmas: Tensor) -> FusedRows:
    sigma = sigmas.detach().to("cpu", torch.float64)
    return FusedRows(DeviceTables(add_noise=torch.stack([torch.ones_like(sigma), sigma], 1)))


class _Euler(Scheduler):
    replaces = ("step", "add_noise", "scale_model_input")
    relies_on = ("_init_step_index", "index_for_timestep")
    ancestral: bool
    _output: tuple[str, str]  # the module and the name of the class of step's results
    sigmas: Tensor
    is_scale_input_called: bool
    step_index: int | None
    begin_index: int | None
    _step_index: int

    def _step(self, model_output: Any, timestep: Any, sample: Any, generator: Any, return_dict: bool) -> Any:
        integers = isinstance(timestep, int | torch.IntTensor | torch.LongTensor)
        if integers or not are_tensors(sample, model_output):
            raise Fallback
        if not self.is_scale_input_called:
            raise Fallback("scale_model_input was not called")  # diffusers warns of it, too
        if not isinstance(self.sigmas, Tensor):
            raise Fallback("its sigmas are no tensor")
        rows = self._rows(_make, self.sigmas, self.timesteps, self.config.prediction_type, self.ancestral)
        self._check_step(sample, model_output)
        if self.step_index is None:
            self._init_step_index(timestep)  # type: ignore[attr-defined]
        row = self._step_index
        if not 0 <= row < len(self.sigmas) - 1:
            raise Fallback
        sample = sample.to(torch.float32)
        noise = self._noise(self.ancestral, model_output, generator, sample, row)
        prev_sample, x0 = self._take(rows, row, sample, model_output, noise)
        self._step_index += 1
        if self.config.prediction_type in ("sample", "original_sample"):
            x0 = model_output
        done = prev_sample.to(model_output.dtype), x0
        return imported(*self._output)(*done) if return_dict else done

    @with_fallback()
    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        if not isinstance(self.sigmas, Tensor):
            raise Fallback
        if self.step_index is None:
            self._init_step_index(timestep)  # type: ignore[attr-defined]
        scales = self._rows(_input_scales, self.sigmas).scales
        self.is_scale_input_called = True
        return sample / scales[self._step_index]

    @with_fallback()
    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if not isinstance(timesteps, Tensor) or timesteps.dim() != 1:
            raise Fallback
        if self.begin_index is None:
            own = self.timesteps.to(timesteps.device)
            rows = [self.index_for_timestep(t, own) for t in timesteps]  # type: ignore[attr-defined]
        else:
            rows = [self.begin_index if self.step_index is None else self.step_index] * len(timesteps)
        return weighted_sum(
            original_samples,
            noise,
            torch.tensor(rows, device="cpu"),
            lambda: self._rows(_forward, self.sigmas).tables,
            "add_noise",
        )


class EulerDiscrete(_Euler):
    """Mixin placed before EulerDiscreteScheduler in the bases; replaces step, add_noise and scale_model_input."""

    ancestral = False
    _output = ("schedulers.scheduling_euler_discrete", "EulerDiscreteSchedulerOutput")

    @with_fallback()
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
            raise Fallback("s_churn adds noise")
        return self._step(model_output, timestep, sample, generator, return_dict)


class EulerAncestralDiscrete(_Euler):
    """Mixin placed before EulerAncestralDiscreteScheduler in the bases; replaces what EulerDiscrete does."""

    ancestral = True
    _output = ("schedulers.scheduling_euler_ancestral_discrete", "EulerAncestralDiscreteSchedulerOutput")

    @with_fallback()
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        return self._step(model_output, timestep, sample, generator, return_dict)
