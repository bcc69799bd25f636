"""What a sampling loop is asked for, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.types import Clip, Model
from ddpm_ext.loop.guidance import Guidance, as_guidance
from ddpm_ext.loop.host_copies import HostCopies
from ddpm_ext.loop.inpaint import Inpaint
from ddpm_ext.loop.interpolation import Interpolation
from ddpm_ext.loop.loop import Loop, Record
from ddpm_ext.loop.rows import LEARNED, LoopTables, make_tables
from ddpm_ext.loop.step import StepOptions
from ddpm_ext.ops.noise import Philox
from ddpm_ext.process.clip import DynamicThreshold, as_clip
from ddpm_ext.tables.step_table import StepTable

if TYPE_CHECKING:
    from ddpm_ext.diffusion import GaussianDiffusion

__all__ = ["CapturedLoop", "Plan", "Record", "collect", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """A loop that can be made: its options are checked, but for what tensors and the model have to say.

    steps: how many; whole: whether all are one graph.
    """

    make: Callable[[], Loop]
    steps: int
    whole: bool


def make_plan(
    diffusion: GaussianDiffusion,
    model: Model,
    shape: tuple[int, ...],
    *,
    sampler: str | StepTable = "ddpm",
    steps: int | None = None,
    spacing: str = "linspace",
    timesteps: Sequence[int] | Tensor | None = None,
    eta: float | None = None,
    clip_denoised: bool | Clip | DynamicThreshold = True,
    guidance: Guidance | float | None = None,
    cond_fn: Callable[..., Tensor] | None = None,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
    inpaint: Inpaint | None = None,
    self_condition: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    start: Tensor | Interpolation | None = None,
    strength: float = 1.0,
    x0: bool = False,
    autocast: torch.dtype | None = None,
    graph: bool | str = False,
    **options: Any,
) -> Plan:
    """See GaussianDiffusion.p_sample_loop; `options` are Loop's own."""
    for name, function in {"model": model, "cond_fn": cond_fn, "denoised_fn": denoised_fn}.items():
        if not callable(function) and (function is not None or name == "model"):
            raise TypeError(f"{name} is {function!r}, expected a function")
    for name, flag in {"self_condition": self_condition, "x0": x0}.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is {flag!r}, expected a bool")
    if inpaint is not None and not isinstance(inpaint, Inpaint):
        raise TypeError(f"inpaint is a {type(inpaint).__name__}, expected an Inpaint")
    if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
        raise TypeError(f"model_kwargs is a {type(model_kwargs).__name__}, expected a dict")
    if autocast not in (None, torch.float16, torch.bfloat16):
        raise ValueError(f"autocast is {autocast!r}, expected torch.float16, torch.bfloat16 or None")
    if graph not in (False, True, "step", "loop"):
        raise ValueError(f"graph is {graph!r}, expected False, True, 'step' or 'loop'")
    clip, threshold = as_clip(clip_denoised)
    step = StepOptions(
        clip=clip,
        threshold=threshold,
        guidance=as_guidance(guidance),
        cond_fn=cond_fn,
        denoised_fn=denoised_fn,
        inpaint=inpaint,
        self_condition=self_condition,
        hand_out=x0,
        learned=diffusion.variance in LEARNED,
        model_kwargs=dict(model_kwargs or {}),
        autocast=autocast,
    )
    if step.self_condition and step.doubled:
        raise ValueError(
            "self_condition is given beside guidance without a function for the unconditional output, expected a "
            "Guidance that has one"
        )
    jumps = None if inpaint is None or inpaint.jump_n_sample == 1 else (inpaint.jump_length, inpaint.jump_n_sample)
    tables = make_tables(diffusion, sampler, steps, spacing, timesteps, eta, guidance=step.guidance, jumps=jumps)
    first = first_row(len(tables), start, strength)
    _check_rows(tables, first, step)

    def make() -> Loop:
        return Loop(diffusion._ops, model, shape, tables, first, step, start=start, graph=graph, **options)

    return Plan(make, len(tables) - first, graph == "loop")


def first_row(rows: int, start: object, strength: float) -> int:
    """The row that a loop begins with: of the last `strength` of all."""
    if isinstance(strength, bool) or not isinstance(strength, int | float):
        raise TypeError(f"strength is {strength!r}, expected a float")
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}, expected 0 < strength <= 1")
    if start is None and strength != 1:
        raise ValueError(f"strength is {strength} without a start, expected 1")
    taken = int(rows * strength + 1e-9)  # 0.29 of 100 is 29
    if taken == 0:
        raise ValueError(f"strength is {strength}, of {rows} steps not one, expected at least {1 / rows:.3g}")
    return rows - taken


def _check_rows(tables: LoopTables, first: int, options: StepOptions) -> None:
    """That the table says what the options need of it."""
    steps = tables.steps
    if steps.c3[first] != 0:
        raise ValueError(f"strength begins with row {first}, whose c3 is {steps.c3[first]}, expected one with c3 0")
    if options.inpaint is not None and not bool(steps.after.any()):
        raise ValueError("inpaint is given, expected a sampler whose table says `after`, where its steps arrive")
    if options.cond_fn is not None and not bool((steps.g0 != 0).any() | (steps.g1 != 0).any()):
        raise ValueError("cond_fn is given, expected a sampler whose table says g0 or g1, a gradient's weights")
    jumps = any(not kind.asks for kind in tables.kinds)
    if jumps and bool((steps.c3 != 0).any()):
        raise ValueError("sampler has rows with c3 beside rows that do not ask the model, expected one kind")


def _recorded_steps(record: str | int | Sequence[int], rows: int) -> set[int] | None:
    """Which steps to record; None for the last alone, as a tensor."""
    if isinstance(record, str):
        if record not in ("all", "last", "x0"):
            raise ValueError(
                f"record is {record!r}, expected 'all', 'last', 'x0', an int k for every k-th step, or steps"
            )
        return None if record == "last" else set(range(rows))
    if isinstance(record, Sequence):
        stop_name = f"{rows}, there being {rows} steps"
        steps = [checks.integer("record's step", step, rows, stop_name) for step in record]
        if len(set(steps)) < len(steps):
            raise ValueError(f"record is {record!r}, expected each step once")
        return set(steps)
    every = checks.integer("record", record, 2**63, "2^63", start=1)
    return {*range(every - 1, rows, every), rows - 1}


def collect(
    plan: Plan,
    *,
    record: str | int | Sequence[int],
    callback: Callable[[Record], object] | None,
    progress: bool,
) -> list[np.ndarray] | Tensor:
    """A loop to its end, or to where `callback` returns true: see GaussianDiffusion.p_sample_loop."""
    chosen = _recorded_steps(record, plan.steps)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback is {callback!r}, expected a function of a Record")
    if plan.whole:
        if callback is not None or chosen is not None:
            raise ValueError("graph is 'loop', expected record='last' and no callback: nothing is seen in between")
        return plan.make().run_whole().clone()
    loop = plan.make()
    copies = None if chosen is None else HostCopies(loop.stepper.state.x.device)
    listed = not isinstance(record, str | int)
    for now in loop.run(progress, copies):
        stop = callback is not None and callback(now)
        if copies is not None and chosen is not None and (now.step in chosen or (stop and not listed)):
            kept = now.x0 if record == "x0" else now.x_t
            assert kept is not None
            copies.add(kept)
        if stop:
            break
    if copies is not None:
        return copies.arrays()
    return now.x_t.clone() if loop.stepper.options.doubled else now.x_t  # without the other half in its memory


class CapturedLoop:
    """A loop to take again and again, with other seeds and conditioning, in the same memory: by a CUDA graph of its
    step, or of all its steps. Made by GaussianDiffusion.capture."""

    def __init__(self, loop: Loop, whole: bool) -> None:
        self._loop, self._whole = loop, whole

    def __call__(
        self,
        rng: Philox | None = None,
        *,
        start: Tensor | Interpolation | None = None,
        noise: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Samples, in a tensor of their own.

        Args:
            rng: seed and sample ids; None: a seed from torch's default CPU generator.
            start, noise: as p_sample_loop's.
            model_kwargs: tensors that take the place of those that the loop was made with; None: the same again.

        Raises:
            TypeError, ValueError: as p_sample_loop.
        """
        self._loop.restart(rng, start, noise, model_kwargs)
        if self._whole:
            return self._loop.run_whole().clone()
        for _ in self._loop.run():
            pass
        return self._loop.stepper.state.x.clone()
