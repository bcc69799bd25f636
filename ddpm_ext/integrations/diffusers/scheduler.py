"""What the schedulers share: rows that follow their settings, the timestep on the host, the noise."""

from __future__ import annotations

import functools
import importlib
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext import ops
from ddpm_ext.base.types import Clip
from ddpm_ext.integrations.shared import Accelerated, drawn, misfit, version, wants_gradient
from ddpm_ext.ops.noise import Philox
from ddpm_ext.process.clip import DynamicThreshold
from ddpm_ext.tables.on_device import DeviceTables, StepDeviceTables
from ddpm_ext.tables.spacing import Jumps
from ddpm_ext.tables.step_table import StepTable

__all__ = [
    "PREDICTIONS",
    "Plan",
    "Scheduler",
    "Threshold",
    "clip_of",
    "imported",
    "jumps",
    "odd",
    "plan_of",
    "result_dtype",
    "tensors",
]

Threshold = tuple[float, float]  # quantile and maximum
OLDEST = (0, 32)
UNFUSED = -2  # in place of a row
KEPT = 8  # how many plans a scheduler keeps
HALVES = {torch.float16, torch.bfloat16}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


@functools.cache
def imported(module: str, name: str) -> Any:
    """diffusers.`module`.`name`"""
    return getattr(importlib.import_module(f"diffusers.{module}"), name)


class Plan(NamedTuple):
    """What a scheduler's settings come to.

    row: of each timestep, -1 where there is none, UNFUSED where that has no fused form; scales: what the model's input
    is divided by, step by step; why: why no step has a fused form, None where that is diffusers' affair.
    """

    tables: DeviceTables | None = None
    row: Sequence[int] = ()
    scales: Sequence[Tensor] = ()
    clip: Clip | None = None
    threshold: DynamicThreshold | None = None
    why: str | None = None

    def why_not(self, row: int) -> str | None:
        """Of a negative row."""
        return "alphas_cumprod is 0 or 1 there, or does not rise" if row == UNFUSED else self.why


def jumps(timestep: Tensor, now: Tensor, after: Tensor) -> Jumps:
    """Steps between a scheduler's float32 alphas_cumprod, with the quotient that float32 makes of them, as diffusers
    does: its beta is up to 1e-4 beside that of float64."""
    return Jumps(timestep, now.double(), after.double(), (now / after).double())


def result_dtype(model_output: Tensor, sample: Tensor) -> torch.dtype:
    """What diffusers' arithmetic ends in."""
    return torch.promote_types(model_output.dtype, sample.dtype)


class Scheduler(Accelerated):
    """What stands before a scheduler's class."""

    library = "diffusers"
    config: Any
    timesteps: Tensor

    def __init_subclass__(cls) -> None:
        """Raises TypeError where a class is made of one of an older diffusers: DDPM's steps led elsewhere then, Euler's
        drew noise that they didn't use, and results had other lengths."""
        super().__init_subclass__()
        version = importlib.import_module("diffusers").__version__ if "_peer" in vars(cls) else None
        if version is not None and tuple(map(int, version.split(".")[:2])) < OLDEST:
            raise TypeError(f"diffusers is {version}, expected {'.'.join(map(str, OLDEST))} or newer")

    # ----------------------------------------------------------------------------------------------------- settings

    def _plan(self, make: Callable[..., Plan], *settings: Any) -> Plan:
        """make(*settings), where it isn't kept. Tensors are looked for by what they are, and then by what is in them:
        each set_timesteps makes new ones."""
        seen, made = self.__dict__.setdefault("_plans", ({}, {}))
        key = (make, *[version(x) if isinstance(x, Tensor) else x for x in settings])
        found = seen.get(key)
        if found is not None:
            return found[0]
        contents = (make, *[_content(x) if isinstance(x, Tensor) else x for x in settings])
        plan = made.get(contents)
        if plan is None:
            with torch.inference_mode(False), torch.no_grad():  # a backward pass may keep what is in it
                plan = make(*settings)
            _keep(made, contents, plan)
        _keep(seen, key, (plan, settings))  # the tensors, too, so that no other gets their id
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
            at = None if timestep.is_cpu else self._place(timestep)
            return int(timestep.item()) if at is None else self._plan(_told, self.timesteps).row[at]
        return int(timestep) if isinstance(timestep, numbers.Integral) else None

    def _place(self, timestep: Tensor) -> int | None:
        """Which of self.timesteps this is a view of; None: of none."""
        own = self.timesteps
        if timestep.dtype != own.dtype or own.dim() != 1:
            return None
        if timestep.untyped_storage().data_ptr() != own.untyped_storage().data_ptr():
            return None
        at, beside = divmod(int(timestep.storage_offset() - own.storage_offset()), own.stride(0) or 1)
        return at if beside == 0 and 0 <= at < len(own) else None

    # --------------------------------------------------------------------------------------------------------- noise

    def _noise(
        self, noisy: bool, like: Tensor, generator: Any, sample: Tensor, dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        """A step's, as the operators take it beside `sample`: drawn as diffusers draws it, in `dtype` or that of the
        model's output, which it is `like`."""
        if not noisy:
            return {"add_noise": False}
        rng: Philox | None = self.accelerated.rng
        if rng is not None:
            return {"rng": rng}
        draw = imported("utils.torch_utils", "randn_tensor")
        z = draw(like.shape, generator=generator, device=like.device, dtype=dtype or like.dtype)
        return drawn(z.to(sample.dtype), sample)

    # ---------------------------------------------------------------------------------------------------------- step

    def _misfit(self, sample: Tensor, model_output: Tensor, *others: Tensor | None, timestep: Any = None) -> str | None:
        """timestep: where it is an index, and so what is found by it has its dimensions."""
        why = misfit(sample, model_output, *others)
        if why is not None:
            return why
        if wants_gradient(sample, model_output, *others):
            return "a gradient is asked for"
        if sample.dim() < 2:
            return "its samples have no channels"
        if model_output.dtype != sample.dtype:  # which misfit looked at
            if model_output.dtype not in HALVES and model_output.dtype != torch.float32:
                return f"the model's output is {str(model_output.dtype).removeprefix('torch.')}"
            if {model_output.dtype, sample.dtype} == HALVES:
                return "its tensors are float16 and bfloat16"
        if isinstance(timestep, Tensor) and timestep.dim() and result_dtype(model_output, sample) in HALVES:
            return "its timestep has dimensions, and its samples 16 bits"
        return None

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
        if x0.dtype != model_output.dtype and self.config.prediction_type == "sample":
            x0 = x0.to(model_output.dtype)  # as there, where it is the model's output
        return prev, x0


def plan_of(
    steps: StepTable | None,
    clip: Clip | None,
    threshold: Threshold | None = None,
    *,
    timesteps: int | None = None,
    unfused: Tensor | None = None,
) -> Plan:
    """timesteps: how many there are, where a row is looked up by one; unfused: those that have none, without `steps`
    all of them."""
    row: list[int] = []
    if timesteps is not None:
        rows = torch.full((timesteps,), -1)
        if unfused is not None:
            rows[unfused] = UNFUSED
        if steps is not None:
            rows[steps.timestep] = torch.arange(len(steps))
        row = rows.tolist()
    if steps is None:
        return Plan(row=row)
    if clip is not None and not clip[0] <= clip[1]:
        return Plan(why=f"clip_sample_range is {clip[1]}")
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


def _content(x: Tensor) -> tuple[object, ...]:
    return x.dtype, x.shape, x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _keep(kept: dict[Any, Any], key: Any, value: Any) -> None:
    """The last few."""
    while len(kept) >= KEPT:
        del kept[next(iter(kept))]
    kept[key] = value


def _told(timesteps: Tensor) -> Plan:
    """Timesteps on the host, in their order."""
    return Plan(row=timesteps.tolist())


def odd(sigma: Tensor) -> str | None:
    """Why float64 sigmas are not to be told by alphas_cumprod, 1 / (1 + sigma^2); None: they are. The last may be 0."""
    least = torch.full_like(sigma, 1e-4)
    least[-1:] = 0
    if len(sigma) < 2 or not (sigma.isfinite() & (sigma >= least)).all():
        return "a sigma is below 1e-4, or no number"
    return None


def tensors(*values: object) -> bool:
    """Whether they are tensors; what else they may be is diffusers' affair."""
    return all(isinstance(x, Tensor) for x in values)
