"""A sampling loop before it is run: its options checked against the process, its rows chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ddpm_ext.base.types import Model
from ddpm_ext.loop.loop import Loop
from ddpm_ext.loop.notes import check_notes
from ddpm_ext.loop.options import LoopOptions, StepOptions
from ddpm_ext.loop.rows import LoopRows, LoopRowsCache, kept_loop_rows
from ddpm_ext.ops.noise import is_differentiated
from ddpm_ext.process.process import Process


@dataclass(frozen=True)
class Plan:
    """A loop that can be made: its options are checked as far as that is possible without tensors and the model."""

    process: Process
    model: Model
    shape: tuple[int, ...]
    options: StepOptions
    rows: LoopRows

    @property
    def whole(self) -> bool:
        """Whether all steps are one CUDA graph."""
        return self.options.graph == "loop"

    def make(self) -> Loop:
        return Loop(self.process.ops, self.model, self.shape, self.rows, self.options)


def make_plan(
    process: Process, cache: LoopRowsCache, model: Model, shape: tuple[int, ...], options: LoopOptions
) -> Plan:
    """See GaussianDiffusion.p_sample_loop."""
    if not callable(model):
        raise TypeError(f"model is {model!r}, expected a function")
    if not torch.compiler.is_compiling() and torch._C._is_tracing():
        raise NotImplementedError("a sampling loop: torch.jit.trace cannot record it, expected single steps (p_sample)")
    if not torch.compiler.is_compiling() and is_differentiated():
        raise NotImplementedError(
            "a sampling loop: torch.func takes a derivative, expected none, or single steps (p_sample) with "
            "backend='reference'"
        )
    rows = kept_loop_rows(cache, process, options)
    check_notes(process, options)
    reads_uncond = any(kind.guided for kind in rows.needs)
    step_options = options.step_options(learned=process.variance_entry.learned, reads_uncond=reads_uncond)
    _check_rows(rows, step_options)
    return Plan(process, model, shape, step_options, rows)


def _check_rows(rows: LoopRows, options: StepOptions) -> None:
    """That the table has what the options need."""
    table = rows.table
    if options.inpaint is not None and not bool((table.signal_after + table.noise_after).any()):
        raise ValueError(
            "inpaint is given, expected a sampler whose table has the levels signal_after and noise_after, where its "
            "steps arrive"
        )
    if options.cond_fn is not None and not bool((table.g0 != 0).any() | (table.g1 != 0).any()):
        raise ValueError("cond_fn is given, expected a sampler whose table says g0 or g1, a gradient's weights")
    if options.self_condition and options.doubled:
        raise ValueError(
            "self_condition is given beside guidance without a function for the unconditional output, expected a "
            "Guidance that has one"
        )
