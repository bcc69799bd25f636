"""The options of a sampling loop. GaussianDiffusion.p_sample_loop documents them.

Each option is listed twice: in LoopOptions with its default, and in TypedDicts. The TypedDicts are for editors and type
checkers, which read from them the keywords of methods that pass on **options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from inspect import Parameter, signature
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, TypeVar

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.types import Clip
from ddpm_ext.loop.guidance import Guidance, as_guidance
from ddpm_ext.loop.inpaint import Inpaint
from ddpm_ext.loop.interpolation import Interpolation
from ddpm_ext.ops.noise import Philox
from ddpm_ext.process.clip import DynamicThreshold, as_clip
from ddpm_ext.tables import SAMPLERS, SPACINGS
from ddpm_ext.tables.names import check_options, sampler_and_spacing
from ddpm_ext.tables.step_table import StepTable

Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """The options of GaussianDiffusion.p_sample_loop, with the same names and defaults. They are checked here.

    Attributes:
        sampler, spacing: ddpm_ext's names, also if the caller gave another library's names or both in one, such as
            "DPM++ 2M Karras".
        clip: the fixed range to clip to, or None.
        threshold: the dynamic thresholding, or None.
        guide: the Guidance, or None.

    Raises:
        TypeError, ValueError: an option has a wrong type or is out of range. Checks that need the model or the schedule
            are made later.
    """

    sampler: str | StepTable = "ddpm"
    steps: int | None = None
    spacing: str | None = None
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
    input_dtype: torch.dtype | None = None
    graph: bool | str = False
    clip: Clip | None = field(init=False)
    threshold: DynamicThreshold | None = field(init=False)
    guide: Guidance | None = field(init=False)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> LoopOptions:
        """LoopOptions(**options), but the TypeError for an unknown keyword suggests options with similar names."""
        check_options(options, _names(), "a loop")
        return cls(**options)

    def __post_init__(self) -> None:
        for name in ("cond_fn", "denoised_fn"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise TypeError(f"{name} is {function!r}, expected a function")
        for name in ("self_condition", "x0"):
            checks.flag(name, getattr(self, name))
        if self.inpaint is not None and not isinstance(self.inpaint, Inpaint):
            raise TypeError(f"inpaint is a {type(self.inpaint).__name__}, expected an Inpaint")
        if self.model_kwargs is not None and not isinstance(self.model_kwargs, Mapping):
            raise TypeError(f"model_kwargs is a {type(self.model_kwargs).__name__}, expected a dict")
        if self.autocast not in (None, torch.float16, torch.bfloat16):
            raise ValueError(f"autocast is {self.autocast!r}, expected torch.float16, torch.bfloat16 or None")
        half_dtypes = (torch.float16, torch.bfloat16) if self.dtype is torch.float32 else ()
        if self.input_dtype not in (None, self.dtype, *half_dtypes):
            expected = ", ".join(map(str, (self.dtype, *half_dtypes)))
            raise ValueError(f"input_dtype is {self.input_dtype!r}, expected None or one of {expected}")
        if self.graph not in (False, True, "step", "loop"):
            raise ValueError(f"graph is {self.graph!r}, expected False, True, 'step' or 'loop'")
        if self.graph and self.compile in ("reduce-overhead", "max-autotune"):
            raise ValueError(
                f"compile is {self.compile!r} with graph, expected one of the two: compile makes CUDA graphs itself"
            )
        self._check_strength()
        if self.sampler == "tuned":
            raise ValueError(
                "sampler is 'tuned', which the command line alone knows, expected a StepTable: "
                "load_model(FOLDER).tuned(STEPS, GUIDANCE) returns the table in a model's folder"
            )
        if isinstance(self.sampler, str):
            sampler, spacing = sampler_and_spacing(self.sampler, self.spacing, SAMPLERS, SPACINGS)
            object.__setattr__(self, "sampler", sampler)
            object.__setattr__(self, "spacing", spacing)
        clip, threshold = as_clip(self.clip_denoised)
        for name, value in {"clip": clip, "threshold": threshold, "guide": as_guidance(self.guidance)}.items():
            object.__setattr__(self, name, value)

    def _check_strength(self) -> None:
        strength = checks.real("strength", self.strength)
        if not 0 < strength <= 1:
            raise ValueError(f"strength is {strength}, expected 0 < strength <= 1")
        if self.start is None and strength != 1:
            raise ValueError(f"strength is {strength} without a start, expected 1")

    @property
    def whole(self) -> bool:
        """Whether all steps are one CUDA graph."""
        return self.graph == "loop"

    @property
    def doubled_kwargs(self) -> bool:
        """Whether tensors in model_kwargs may have 2 * batch rows, since the model gets the batch twice.

        A call with a single batch gets the second half of such tensors.
        """
        return self.guide is not None and self.guide.unconditional is None


@cache
def _names() -> frozenset[str]:
    """The names of the options."""
    return frozenset(option.name for option in fields(LoopOptions) if option.init)


class Record(NamedTuple):
    """The state of a loop after a step.

    Both tensors are on the loop's device, in buffers that later steps overwrite: copy what you want to keep.

    Attributes:
        step: the number of the step, 0 for the first.
        timestep: the timestep at which the step started.
        x_t: the samples after the step.
        x0: the predicted clean samples, or None unless the loop has x0=True.

    Examples:
        >>> for record in gd.sample_progressive(model, images.shape, sampler="ddim", steps=3, x0=True):
        ...     print(record.step, record.timestep, record.x0.shape)
        0 999 torch.Size([4, 3, 8, 8])
        1 666 torch.Size([4, 3, 8, 8])
        2 332 torch.Size([4, 3, 8, 8])
    """

    step: int
    timestep: int | float
    x_t: Tensor
    x0: Tensor | Any = None  # "| Any": with x0=True callers need no check for None


Recorded: TypeAlias = Literal["all", "x0"] | int | Sequence[int]
"""The values of the argument `record` for which p_sample_loop returns a list: all except "last"."""


class CaptureKeywords(TypedDict, total=False):
    """The keywords of `capture`."""

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
    """The keywords of `sample_progressive`."""

    x0: bool
    graph: bool | str


class SampleKeywords(ProgressiveKeywords, total=False):
    """The keywords of `sample` and `p_sample_loop`, except `record`, which determines the type of their result."""

    callback: Callable[[Record], object] | None
    progress: bool


def lists_options_of(source: Callable[..., Any], *without: str) -> Callable[[Method], Method]:
    """Decorator that adds the options of `source` to the signature of a method that passes **options on to it.

    So help() shows the options with their defaults.

    Args:
        source: the function that takes the options.
        without: options that the method does not take. They are not added, nor are options that are already parameters
            of the method.
    """

    def decorate(method: Method) -> Method:
        method_signature = signature(method)
        method_parameters = [p for p in method_signature.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        left_out = {*without, *(parameter.name for parameter in method_parameters)}
        source_parameters = [p for p in signature(source).parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
        options = [parameter for parameter in source_parameters if parameter.name not in left_out]
        positional = sum(parameter.kind is not Parameter.KEYWORD_ONLY for parameter in method_parameters)
        parameters = [*method_parameters[:positional], *options, *method_parameters[positional:]]
        method.__signature__ = method_signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return method

    return decorate
