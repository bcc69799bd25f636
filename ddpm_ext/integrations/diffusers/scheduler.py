"""What the schedulers share: rows that follow their settings, the timestep on the host, the noise."""

from __future__ import annotations

import functools
import importlib
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext import ops
from ddpm_ext.integrations.accelerated import Accelerated, misfit, version, wants_gradient
from ddpm_ext.noise import Philox
from ddpm_ext.spacing import Jumps
from ddpm_ext.step_table import StepTable
from ddpm_ext.tables import DeviceTables, StepDeviceTables
from ddpm_ext.thresholding import Clip, DynamicThreshold

__all__ = [
    "PREDICTIONS",
    "Plan",
    "Scheduler",
    "Threshold",
    "clip_of",
    "imported",
    "jumps",
    "plan_of",
    "result_dtype",
    "tensors",
]

Threshold = tuple[float, float]  # quantile and maximum
KEPT = 4  # how many settings' plans a scheduler keeps
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


@functools.cache
def imported(module: str, name: str) -> Any:
    """diffusers.`module`.`name`"""
    return getattr(importlib.import_module(f"diffusers.{module}"), name)


class Plan(NamedTuple):
    """What a scheduler's settings come to.

    made_of: they themselves, kept alive; row: of each timestep, -1 where there is none; why: why its steps have no
    fused form, None where that is diffusers' affair.
    """

    made_of: tuple[object, ...] = ()
    tables: DeviceTables | None = None
    row: Sequence[int] = ()
    clip: Clip | None = None
    threshold: DynamicThreshold | None = None
    why: str | None = None


def jumps(timestep: Tensor, now: Tensor, after: Tensor) -> Jumps:
    """Steps between a scheduler's float32 alphas_cumprod, with the beta that float32 makes of them, as diffusers does:
    up to 1e-4 beside that of float64."""
    return Jumps(timestep, now.double(), after.double(), (1 - now / after).double())


def result_dtype(model_output: Tensor, sample: Tensor) -> torch.dtype:
    """What diffusers' arithmetic ends in."""
    return torch.promote_types(model_output.dtype, sample.dtype)


class Scheduler(Accelerated):
    """What stands before a scheduler's class."""

    library = "diffusers"
    config: Any
    timesteps: Tensor

    # ----------------------------------------------------------------------------------------------------- settings

    def _plan(self, make: Any, *settings: Any) -> Plan:
        """Of `settings`, made by `make(*settings)` where it isn't kept. Tensors count by what is in them."""
        key = (make.__name__, *[version(x) if isinstance(x, Tensor) else x for x in settings])
        plans = self.__dict__.setdefault("_plans", {})
        plan = plans.get(key)
        if plan is None:
            while len(plans) >= KEPT:
                del plans[next(iter(plans))]
            with torch.no_grad():
                plan = plans[key] = make(*settings)._replace(made_of=settings)
        return plan

    def _row(self, plan: Plan, timestep: Any) -> tuple[int, int]:
        """The timestep on the host, and its row; -1 where it has none."""
        t = self._host_timestep(timestep)
        return (t, plan.row[t]) if t is not None and 0 <= t < len(plan.row) else (-1, -1)

    def _host_timestep(self, timestep: Any) -> int | None:
        """As an int; None: it is none. One of self.timesteps on a GPU is found by where it lies, without a
        synchronisation but the first after they were set."""
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1 or timestep.is_floating_point():
                return None
            own = self.timesteps
            if (
                not timestep.is_cpu
                and timestep.dtype == own.dtype
                and timestep.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
            ):
                told = self._plan(_told, own).row
                return told[int(timestep.storage_offset() - own.storage_offset())]
            return int(timestep.item())
        return int(timestep) if isinstance(timestep, numbers.Integral) else None

    # --------------------------------------------------------------------------------------------------------- noise

    def _noise(
        self, drawn: bool, like: Tensor, generator: Any, dtype: torch.dtype, drawn_dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        """A step's, as the operators take it, for samples of `dtype`: drawn as diffusers draws it, in `drawn_dtype` or
        that of the model's output."""
        if not drawn:
            return {"add_noise": False}
        rng: Philox | None = self.accelerated.rng
        if rng is not None:
            return {"rng": rng}
        draw = imported("utils.torch_utils", "randn_tensor")
        z = draw(like.shape, generator=generator, device=like.device, dtype=drawn_dtype or like.dtype)
        return {"noise": z.to(dtype)}

    # ---------------------------------------------------------------------------------------------------------- step

    def _misfit(self, sample: Tensor, model_output: Tensor, *others: Tensor | None) -> str | None:
        why = misfit(sample, model_output, *others)
        if why is None and wants_gradient(sample, model_output, *others):
            why = "a gradient is asked for"
        if why is None and {model_output.dtype, sample.dtype} == {torch.float16, torch.bfloat16}:
            why = "its tensors are float16 and bfloat16"
        return why

    def _take(
        self,
        plan: Plan,
        row: int,
        sample: Tensor,
        model_output: Tensor,
        noise: dict[str, Any],
        **extras: Any,
    ) -> tuple[Tensor, Tensor]:
        """A step, and the predicted clean sample: both in one launch; three and a quantile with a threshold."""
        assert plan.tables is not None
        table = plan.tables.get("extended", sample.device, torch.float32)
        x0 = torch.empty_like(sample)
        if plan.threshold is not None:
            rows = plan.tables.get("x0", sample.device, torch.float32)
            ops.extended_step(sample, model_output, rows, row, clip=None, add_noise=False, out=x0)
            extras |= {"x_start": x0, "x_start_scale": plan.threshold.x_start_scale(x0)}
        prev = ops.extended_step(sample, model_output, table, row, clip=plan.clip, x0_out=x0, **noise, **extras)
        return prev, x0


def plan_of(
    steps: StepTable, clip: Clip | None, threshold: Threshold | None = None, *, timesteps: int | None = None
) -> Plan:
    """timesteps: how many there are, where a row is looked up by one."""
    row: list[int] = []
    if timesteps is not None:
        rows = torch.full((timesteps,), -1)
        rows[steps.timestep] = torch.arange(len(steps))
        row = rows.tolist()
    if threshold is None:
        return Plan(tables=StepDeviceTables(steps), row=row, clip=clip)
    quantile, maximum = threshold
    if not 0 < quantile <= 1 <= maximum:
        return Plan(why=f"dynamic_thresholding_ratio is {quantile}, sample_max_value is {maximum}")
    return Plan(tables=StepDeviceTables(steps), row=row, clip=clip, threshold=DynamicThreshold(quantile, maximum))


def clip_of(config: Any) -> tuple[Clip | None, Threshold | None]:
    """A config's range of the predicted clean sample, and whether it is a sample's own."""
    if config.thresholding:
        return (-1.0, 1.0), (config.dynamic_thresholding_ratio, config.sample_max_value)
    if config.clip_sample:
        return (-config.clip_sample_range, config.clip_sample_range), None
    return None, None


def _told(timesteps: Tensor) -> Plan:
    """Timesteps on the host, in their order."""
    return Plan(row=timesteps.tolist())


def tensors(*values: object) -> bool:
    """Whether they are tensors of samples with channels; what else they may be is diffusers' affair."""
    return all(isinstance(x, Tensor) and x.dim() > 1 for x in values)
