"""p_sample_loop's options as keywords of the methods that pass them on, so that editors and type checkers see them.

GaussianDiffusion.p_sample_loop says what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

import torch
from torch import Tensor

from ddpm_ext.base.types import Clip
from ddpm_ext.loop.guidance import Guidance
from ddpm_ext.loop.inpaint import Inpaint
from ddpm_ext.loop.interpolation import Interpolation
from ddpm_ext.loop.loop import Record
from ddpm_ext.ops.noise import Philox
from ddpm_ext.process.clip import DynamicThreshold
from ddpm_ext.tables.step_table import StepTable

__all__ = ["CaptureKeywords", "ProgressiveKeywords", "Recorded", "SampleKeywords"]

Recorded: TypeAlias = Literal["all", "x0"] | int | Sequence[int]
"""A `record` whose result is a list."""


class CaptureKeywords(TypedDict, total=False):
    """Those of `capture`."""

    sampler: str | StepTable
    steps: int | None
    spacing: str | None
    timesteps: Sequence[int] | Tensor | None
    eta: float | None
    clip_denoised: bool | Clip | DynamicThreshold
    guidance: Guidance | float | None
    cond_fn: Callable[..., Tensor] | None
    denoised_fn: Callable[[Tensor], Tensor] | None
    inpaint: Inpaint | None
    self_condition: bool
    model_kwargs: Mapping[str, Any] | None
    start: Tensor | Interpolation | None
    strength: float
    noise: Tensor | None
    rng: Philox | None
    device: torch.device | str | None
    dtype: torch.dtype
    compile: bool | str
    autocast: torch.dtype | None
    input_dtype: torch.dtype | None


class ProgressiveKeywords(CaptureKeywords, total=False):
    """Those of `sample_progressive`."""

    x0: bool
    graph: bool | str


class SampleKeywords(ProgressiveKeywords, total=False):
    """Those of `sample`, which are all but `record`, by which the result's type is known."""

    callback: Callable[[Record], object] | None
    progress: bool
