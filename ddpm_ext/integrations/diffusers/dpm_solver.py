"""diffusers' DPMSolverMultistepScheduler: DPM-Solver++ of first and second order, and its SDE form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_ext.integrations.diffusers.scheduler import (
    PREDICTIONS,
    Plan,
    Scheduler,
    Threshold,
    clip_of,
    imported,
    odd,
    plan_of,
    result_dtype,
    tensors,
)
from ddpm_ext.integrations.registry import Support
from ddpm_ext.tables.samplers import dpmpp_2m, dpmpp_2m_sde
from ddpm_ext.tables.spacing import Grid
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


def _plan(
    sigmas: Tensor,
    timesteps: Tensor,
    prediction_type: str,
    algorithm_type: str,
    solver_type: str,
    solver_order: int,
    flow: bool,
    threshold: Threshold | None,
) -> Plan:
    """Row i goes from sigmas[i] to the next one at first order, row n + i at second order."""
    if algorithm_type not in SOLVERS:
        return Plan(why=f"algorithm_type is {algorithm_type!r}")
    if solver_order > 2 or (solver_order == 2 and solver_type != "midpoint"):
        return Plan(why=f"solver_order is {solver_order}, solver_type is {solver_type!r}")
    if flow or prediction_type == "flow_prediction":
        return Plan(why="its sigmas are those of a flow")
    if prediction_type not in PREDICTIONS:
        return Plan()
    sigma = sigmas.detach().to("cpu", torch.float64)
    if (why := odd(sigma)) is not None:
        return Plan(why=why)
    if len(timesteps) != len(sigma) - 1:
        return Plan(why="its timesteps are not one a sigma")
    if not (sigma[1:] < sigma[:-1]).all():
        return Plan(why="its sigmas do not fall")
    kept = 1 / (1 + sigma**2)
    t = timesteps.detach().cpu().long()
    grid = Grid(torch.arange(len(t)), kept, 1 - kept[:-1] / kept[1:])
    second = SOLVERS[algorithm_type](grid, prediction=PREDICTIONS[prediction_type], lower_order_final=False)
    columns = {name: getattr(second, name) for name in COLUMNS if name != "draw"}
    first = columns | {"c0": second.c0 + second.c3, "c3": torch.zeros_like(second.c3)}
    both = {name: torch.cat([first[name], columns[name]]) for name in columns}
    draw = t if len(t.unique()) == len(t) and bool((t >= 0).all()) else grid.timestep
    steps = StepTable(**both, draw=torch.cat([draw, draw]))
    return plan_of(steps, None if threshold is None else (-1.0, 1.0), threshold)


class DPMSolverMultistep(Scheduler):
    """Before DPMSolverMultistepScheduler."""

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

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        prev_sample = self._step(model_output, timestep, sample, generator, variance_noise)
        if prev_sample is None:
            given = {} if variance_noise is None else {"variance_noise": variance_noise}
            return super().step(  # type: ignore[misc]
                model_output, timestep, sample, generator=generator, return_dict=return_dict, **given
            )
        if not return_dict:
            return (prev_sample,)
        return imported("schedulers.scheduling_utils", "SchedulerOutput")(prev_sample=prev_sample)

    def _step(
        self, model_output: Any, timestep: Any, sample: Any, generator: Any, variance_noise: Any
    ) -> Tensor | None:
        config = self.config
        if self.num_inference_steps is None or not tensors(sample, model_output):
            return None
        plan = self._plan(
            _plan,
            self.sigmas,
            self.timesteps,
            config.prediction_type,
            config.algorithm_type,
            config.solver_type,
            config.solver_order,
            getattr(config, "use_flow_sigmas", False),
            clip_of(config)[1] if config.thresholding else None,
        )
        if plan.tables is None:
            return self._aside("step", plan.why)
        sde = config.algorithm_type == "sde-dpmsolver++"
        variance_noise = variance_noise if sde else None
        if config.variance_type in ("learned", "learned_range") and config.prediction_type == "epsilon":
            model_output = model_output[:, :3]
        why = self._misfit(sample, model_output, variance_noise)
        if why is not None:
            return self._aside("step", why)
        if self.step_index is None:
            self._init_step_index(timestep)  # type: ignore[attr-defined]
        at, steps = self._step_index, len(self.timesteps)
        if not 0 <= at < steps:
            return None

        sample = sample.to(result_dtype(model_output, sample))
        first = config.solver_order == 1 or self.lower_order_nums < 1 or self._ends_at_first_order(at, steps)
        history = None if first else self.model_outputs[-1]
        if history is not None and (misfit := self._misfit(sample, history)) is not None:
            return self._aside("step", misfit)
        if variance_noise is not None:
            noise: dict[str, Any] = {"noise": variance_noise.to(sample.dtype)}
        else:
            noise = self._noise(sde, model_output, generator, sample, torch.float32)
        if history is not None:
            history = history.to(sample.dtype)
        prev_sample, x0 = self._take(plan, at if first else steps + at, sample, model_output, noise, history=history)

        self.model_outputs[:] = [*self.model_outputs[1:], x0]
        if self.lower_order_nums < config.solver_order:
            self.lower_order_nums += 1
        self._step_index += 1
        return prev_sample.to(x0.dtype)

    def _ends_at_first_order(self, at: int, steps: int) -> bool:
        config = self.config
        return at == steps - 1 and (
            config.euler_at_final or (config.lower_order_final and steps < 15) or config.final_sigmas_type == "zero"
        )
