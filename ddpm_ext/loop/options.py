"""The options of a sampling loop, checked: what p_sample_loop and its relatives pass on as one object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.types import Clip
from ddpm_ext.loop.guidance import Guidance, as_guidance
from ddpm_ext.loop.inpaint import Inpaint
from ddpm_ext.loop.interpolation import Interpolation
from ddpm_ext.ops.noise import Philox
from ddpm_ext.process.clip import DynamicThreshold, as_clip
from ddpm_ext.tables.step_table import StepTable

__all__ = ["LoopOptions", "StepOptions"]


@dataclass(frozen=True)
class StepOptions:
    """What a step does besides its row: p_sample_loop's options of the same names, and what follows from them.

    threshold: how to find each sample's own range for the clip, or None. returns_x0: whether a Record holds the
    predicted clean samples. learned: whether the model returns a variance beside its prediction. reads_uncond: whether
    a row reads the unconditional output.
    """

    clip: Clip | None
    threshold: DynamicThreshold | None
    guidance: Guidance | None
    cond_fn: Callable[..., Tensor] | None
    denoised_fn: Callable[[Tensor], Tensor] | None
    inpaint: Inpaint | None
    self_condition: bool
    returns_x0: bool
    learned: bool
    reads_uncond: bool
    model_kwargs: Mapping[str, Any]
    autocast: torch.dtype | None

    @property
    def doubled(self) -> bool:
        """Whether the model gets the batch twice, at a guided step."""
        return self.doubled_kwargs and (self.guidance.scale != 1 or self.reads_uncond)  # type: ignore[union-attr]

    @property
    def doubled_kwargs(self) -> bool:
        """Whether tensors in model_kwargs have two rows a sample, of which a call with a single batch gets the second
        half."""
        return self.guidance is not None and self.guidance.unconditional is None


@dataclass(frozen=True)
class LoopOptions:
    """The options of GaussianDiffusion.p_sample_loop, by the same names.

    Raises:
        TypeError, ValueError: an option of another type, or out of range, as far as it can be seen without the model
        and the schedule.
    """

    sampler: str | StepTable = "ddpm"
    steps: int | None = None
    spacing: str = "linspace"
    timesteps: Sequence[int] | Tensor | None = None
    eta: float | None = None
    clip_denoised: bool | Clip | DynamicThreshold = True
    guidance: Guidance | float | None = None
    cond_fn: Callable[..., Tensor] | None = None
    denoised_fn: Callable[[Tensor], Tensor] | None = None
    inpaint: Inpaint | None = None
    self_condition: bool = False
    model_kwargs: Mapping[str, Any] | None = None
    start: Tensor | Interpolation | None = None
    strength: float = 1.0
    noise: Tensor | None = None
    rng: Philox | None = None
    x0: bool = False
    device: torch.device | str | None = None
    dtype: torch.dtype = torch.float32
    compile: bool | str = False
    autocast: torch.dtype | None = None
    graph: bool | str = False

    def __post_init__(self) -> None:
        for name in ("cond_fn", "denoised_fn"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise TypeError(f"{name} is {function!r}, expected a function")
        for name in ("self_condition", "x0"):
            flag = getattr(self, name)
            if not isinstance(flag, bool):
                raise TypeError(f"{name} is {flag!r}, expected a bool")
        if self.inpaint is not None and not isinstance(self.inpaint, Inpaint):
            raise TypeError(f"inpaint is a {type(self.inpaint).__name__}, expected an Inpaint")
        if self.model_kwargs is not None and not isinstance(self.model_kwargs, Mapping):
            raise TypeError(f"model_kwargs is a {type(self.model_kwargs).__name__}, expected a dict")
        if self.autocast not in (None, torch.float16, torch.bfloat16):
            raise ValueError(f"autocast is {self.autocast!r}, expected torch.float16, torch.bfloat16 or None")
        if self.graph not in (False, True, "step", "loop"):
            raise ValueError(f"graph is {self.graph!r}, expected False, True, 'step' or 'loop'")
        if self.graph and self.compile in ("reduce-overhead", "max-autotune"):
            raise ValueError(
                f"compile is {self.compile!r}, which makes CUDA graphs itself, beside graph, expected one of them"
            )
        self._check_strength()

    def _check_strength(self) -> None:
        strength = checks.real("strength", self.strength)
        if not 0 < strength <= 1:
            raise ValueError(f"strength is {strength}, expected 0 < strength <= 1")
        if self.start is None and strength != 1:
            raise ValueError(f"strength is {strength} without a start, expected 1")

    def step_options(self, *, learned: bool, reads_uncond: bool) -> StepOptions:
        """What a step needs of them."""
        clip, threshold = as_clip(self.clip_denoised)
        return StepOptions(
            clip=clip,
            threshold=threshold,
            guidance=as_guidance(self.guidance),
            cond_fn=self.cond_fn,
            denoised_fn=self.denoised_fn,
            inpaint=self.inpaint,
            self_condition=self.self_condition,
            returns_x0=self.x0,
            learned=learned,
            reads_uncond=reads_uncond,
            model_kwargs=dict(self.model_kwargs or {}),
            autocast=self.autocast,
        )
