"""diffusers' DPMSolverMultistepScheduler: DPM-Solver++ of first and second order, and its SDE form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_ext.integrations.diffusers.scheduler import (
    PREDICTIONS,
    FusedRows,
    Scheduler,
    Threshold,
    alphas_cumprod_of,
    are_tensors,
    clip_of,
    imported,
    make_rows,
    result_dtype,
)
from ddpm_ext.integrations.fallback import Fallback, with_fallback
from ddpm_ext.integrations.shared import Support
from ddpm_ext.tables.grid import Grid
from ddpm_ext.tables.samplers import dpmpp_2m, dpmpp_2m_sde
from ddpm_ext.tables.step_table import COLUMNS, StepTable

__all__ = ["SUPPORT", "DPMSolverMultistep"]

SUPPORT = (
    Support(
        "DPMSolverMultistepScheduler",
        "step",
        "algorithm_type dpmsolver++, sde-dpmsolver++, solver_order 1 or 2, solver_type midpoint; prediction_type "
        "epsilon, sample, v_prediction; thresholding; variance_noise; all sigmas that fall",
        "dpmsolver, sde-dpmsolver; solver_order 3; solver_type heun; flow sigmas; sigmas below 1e-4 before the last; "
        "sample_max_value below 1; float64; gradients",
    ),
    Support("DPMSolverMultistepScheduler", "add_noise", "", "always"),
)

SOLVERS = {"dpmsolver++": dpmpp_2m, "sde-dpmsolver++": dpmpp_2m_sde}


def _make(
    sigmas: Tensor,
    timesteps: Tensor,
    prediction_type: str,
    algorithm_type: str,
    solver_type: str,
    solver_order: int,
    flow: bool,
    threshold: Threshold | None,
) -> FusedRows:
    """Row i goes from sigmas[i] to the next one at first order, row n + i at second order."""
    if algorithm_type not in SOLVERS:
        raise Fallback(f"algorithm_type is {algorithm_type!r}")
    if solver_order > 2 or (solver_order == 2 and solver_type != "midpoint"):
        raise Fallback(f"solver_order is {solver_order}, solver_type is {solver_type!r}")
    if flow or prediction_type == "flow_prediction":
        raise Fallback("its sigmas are those of a flow")
    if prediction_type not in PREDICTIONS:
        raise Fallback
    levels = alphas_cumprod_of(sigmas)
    if len(timesteps) != len(sigmas) - 1:
        raise Fallback("its timesteps are not one a sigma")
    if not (sigmas[1:] < sigmas[:-1]).all():
        raise Fallback("its sigmas do not fall")
    t = timesteps.detach().cpu().long()
    grid = Grid(torch.arange(len(t), device="cpu"), levels, 1 - levels[:-1] / levels[1:])
    second = SOLVERS[algorithm_type](grid, prediction=PREDICTIONS[prediction_type], lower_order_final=False)
    columns = {name: getattr(second, name) for name in COLUMNS if name != "draw"}
    first = columns | {"c0": second.c0 + second.c3, "c3": torch.zeros_like(second.c3)}
    both = {name: torch.cat([first[name], columns[name]]) for name in columns}
    draw = t if len(t.unique()) == len(t) and bool((t >= 0).all()) else grid.timestep
    steps = StepTable(**both, draw=torch.cat([draw, draw]))
    return make_rows(steps, None if threshold is None else (-1.0, 1.0), threshold)


class DPMSolverMultistep(Scheduler):
    """Mixin placed before DPMSolverMultistepScheduler in the bases; replaces step."""

    replaces = ("step",)
    relies_on = (
        "convert_model_output",
        "dpm_solver_first_order_update",
        "multistep_dpm_solver_second_order_update",
        "_init_step_index",
        "_sigma_to_alpha_sigma_t",
        "_threshold_sample",
    )
    sigmas: Tensor
    num_inference_steps: int | None
    step_index: int | None
    _step_index: int
    lower_order_nums: int
    model_outputs: list[Tensor | None]

    @with_fallback()
    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        config = self.config
        if self.num_inference_steps is None or not are_tensors(sample, model_output):
            raise Fallback
        rows = self._rows(
            _make,
            self.sigmas,
            self.timesteps,
            config.prediction_type,
            config.algorithm_type,
            config.solver_type,
            config.solver_order,
            getattr(config, "use_flow_sigmas", False),
            clip_of(config)[1] if config.thresholding else None,
        )
        sde = config.algorithm_type == "sde-dpmsolver++"
        variance_noise = variance_noise if sde else None
        if config.variance_type in ("learned", "learned_range") and config.prediction_type == "epsilon":
            model_output = model_output[:, :3]
        self._check_step(sample, model_output, variance_noise)
        if self.step_index is None:
            self._init_step_index(timestep)  # type: ignore[attr-defined]
        index, steps = self._step_index, len(self.timesteps)
        if not 0 <= index < steps:
            raise Fallback

        sample = sample.to(result_dtype(model_output, sample))
        first = config.solver_order == 1 or self.lower_order_nums < 1 or self._ends_at_first_order(index, steps)
        history = None if first else self.model_outputs[-1]
        if history is not None:
            self._check_step(sample, history)
            history = history.to(sample.dtype)
        if variance_noise is not None:
            noise: dict[str, Any] = {"noise": variance_noise.to(sample.dtype)}
        else:
            noise = self._noise(sde, model_output, generator, sample, index, torch.float32)
        row = index if first else steps + index
        prev_sample, x0 = self._take(rows, row, sample, model_output, noise, history=history)

        self.model_outputs[:] = [*self.model_outputs[1:], x0]
        if self.lower_order_nums < config.solver_order:
            self.lower_order_nums += 1
        self._step_index += 1
        prev_sample = prev_sample.to(x0.dtype)
        if not return_dict:
            return (prev_sample,)
        return imported("schedulers.scheduling_utils", "SchedulerOutput")(prev_sample=prev_sample)

    def _ends_at_first_order(self, index: int, steps: int) -> bool:
        config = self.config
        return index == steps - 1 and (
            config.euler_at_final or (config.lower_order_final and steps < 15) or config.final_sigmas_type == "zero"
        )
