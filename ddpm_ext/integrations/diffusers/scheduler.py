"""Scheduler, the base of all mixins for schedulers of diffusers.

It caches rows, finds a timestep's row, draws a step's noise and takes the step.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import numbers
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.base.types import Clip
from ddpm_ext.integrations.fallback import Fallback, made_outside_autograd, result_of, with_fallback
from ddpm_ext.integrations.library_code import library_class
from ddpm_ext.integrations.row_stepper import RowStepper
from ddpm_ext.integrations.shared import Accelerated, peer_class, peer_method
from ddpm_ext.integrations.tensors import (
    check_tensors,
    dtype_name,
    index_of,
    noise_arguments,
    version_of,
    wants_gradient,
)
from ddpm_ext.ops.result_memory import empty_like
from ddpm_ext.process.clip import DynamicThreshold
from ddpm_ext.tables.step_table import StepTable

Made = TypeVar("Made")
OLDEST = (0, 32)  # the oldest version of diffusers whose schedulers can be accelerated
UNFUSED = -1  # stands for the row of a timestep that has no fused form
# The table rows of all schedulers, and the weights of their add_noise: schedulers with equal settings share them. A
# traced scheduler's key has its class and LoopKey; any other has the function that makes the value, and what it reads.
# If a user wrote the step, the rows are cached in the scheduler itself.
ROWS: BoundedCache[Any] = BoundedCache(64)
STEPS = ("step", "step_pred")
# Methods that count neither as fused calls nor as fallbacks: they launch no kernel of a step.
NOT_COUNTED = ("set_timesteps", "scale_model_input")
HALVES = {torch.float16, torch.bfloat16}


@functools.cache
def imported(module: str, name: str) -> Any:
    """An attribute of a module, which is imported when it is first needed."""
    return getattr(importlib.import_module(module), name)


class FusedRows(NamedTuple):
    """The rows of a scheduler with given settings.

    Attributes:
        rows: the rows, or None if no timestep has a fused form.
        row: {timestep: index of its row, or UNFUSED}.
    """

    rows: RowStepper | None
    row: dict[int, int]


class NextInput(NamedTuple):
    """The scaled input of the next model call. The launch of a step writes it along with the step's result.

    Attributes:
        sample, version: the result of the step, and its `version_of`.
        model_input: `sample` times the scheduler's factor. The caller may write to it, so it is returned only once.
    """

    sample: Tensor
    version: tuple[int, ...] | None
    model_input: Tensor

    @classmethod
    def of(cls, sample: Tensor, model_input: Tensor) -> NextInput:
        return cls(sample, version_of(sample), model_input)

    def is_of(self, sample: object) -> bool:
        """Whether `sample` is the tensor that the step returned and has not been written to since.

        False for inference tensors, because they do not count writes.
        """
        return sample is self.sample and self.version is not None and version_of(self.sample) == self.version


def result_dtype(model_output: Tensor, sample: Tensor) -> torch.dtype:
    """The dtype of the result of diffusers' step."""
    return torch.promote_types(model_output.dtype, sample.dtype)


class Scheduler(Accelerated):
    """The base of the mixins for schedulers."""

    library = "diffusers"
    config: Any
    timesteps: Tensor

    def __init_subclass__(cls) -> None:
        """In an accelerated class, replaces each method in `replaces`, such as `step`, by the mixin's, such as `_step`.

        Except for methods in NOT_COUNTED, the replacement catches a Fallback and runs the library's method.

        Raises TypeError if diffusers is older than OLDEST: in these versions, DDPM's steps had different results,
        Euler's steps drew noise that they did not use, and steps returned tuples of different lengths.
        """
        super().__init_subclass__()
        if "_peer" not in vars(cls):
            return
        version = importlib.import_module("diffusers").__version__
        if tuple(map(int, version.split(".")[:2])) < OLDEST:
            raise TypeError(f"diffusers is {version}, expected {'.'.join(map(str, OLDEST))} or newer")
        for name in {*cls.replaces, "set_timesteps"}:
            peers_method = getattr(cls._peer, name, None)
            if peers_method is not None:
                setattr(cls, name, _replacement(peers_method, name, getattr(cls, f"_{name}")))

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> Any:
        self.accelerated.begin_loop()
        return peer_method(self, "set_timesteps")(*args, **kwargs)

    # ----------------------------------------------------------------------------------------------------- settings

    def _rows(self, make: Callable[..., Made], *settings: Any) -> Made:
        """make(*settings), cached for all schedulers, with the values of the settings as the key.

        The result of the last call is also stored with the object, by the identity and version of the settings. So a
        call with the same settings reads no tensor, which may be on a GPU. Raises the Fallback that `make` raises.
        """
        return self._cached((make, *settings), make, settings)

    def _cached(self, key: tuple[Any, ...], make: Callable[..., Made], arguments: tuple[Any, ...]) -> Made:
        """make(*arguments), cached by `key` in place of the arguments; see _rows."""
        versions = tuple([(id(x), version_of(x)) if isinstance(x, Tensor) else x for x in key])
        latest = self.__dict__.setdefault("_latest_rows", {})
        entry = latest.get(make)
        # Inference tensors do not count writes. So the values of those on the CPU are compared in each call; reading
        # those on a GPU would wait for it.
        has_uncounted_writes = any(isinstance(x, Tensor) and x.is_inference() and x.is_cpu for x in key)
        if entry is None or entry[0] != versions or has_uncounted_writes:
            contents = tuple(tensor_contents(x) if isinstance(x, Tensor) else x for x in key)
            result = ROWS.get_or_make(contents, lambda: made_outside_autograd(make, *arguments))
            # The entry keeps the tensors of `key` alive: `versions` has their ids, which Python could reuse.
            entry = latest[make] = versions, key, result
        return result_of(entry[2])

    def _row(self, rows: FusedRows, timestep: Any) -> tuple[int, int]:
        """The timestep as an int, and the index of its row. Raises Fallback if it has no row.

        A pipeline loops over self.timesteps. The index of an element follows from its address, so the element is not
        read: on a GPU, the host waits only once after each set_timesteps.
        """
        if isinstance(timestep, Tensor) and timestep.numel() == 1 and not timestep.is_floating_point():
            index = self._index_of(timestep)
            timestep = int(timestep.item() if index is None else self._times()[index])
        if not isinstance(timestep, numbers.Integral) or int(timestep) not in rows.row:
            raise Fallback
        t = int(timestep)
        if rows.row[t] == UNFUSED:
            raise Fallback("alphas_cumprod is 0 or 1 there, or does not rise")
        return t, rows.row[t]

    def _times(self) -> Any:
        """A list of the scheduler's timesteps as Python numbers. A tensor on a GPU is read only once."""
        timesteps = self.timesteps
        if timesteps.is_inference() and timesteps.is_cpu:  # inference tensors do not count writes
            return timesteps.tolist()
        entry = self.__dict__.get("_host_timesteps")
        if entry is None or entry[0] is not timesteps or entry[1] != version_of(timesteps):
            entry = self.__dict__["_host_timesteps"] = timesteps, version_of(timesteps), timesteps.tolist()
        return entry[2]

    def _index_of(self, timestep: Tensor) -> int | None:
        """The index of the element of self.timesteps that `timestep` is a view of, or None. No tensor is read."""
        timesteps: Any = self.timesteps
        return index_of(timesteps, timestep) if isinstance(timesteps, Tensor) else None

    # --------------------------------------------------------------------------------------------------------- noise

    def _noise(self, has_noise: bool, like: Tensor, generator: Any, sample: Tensor, index: int) -> dict[str, Any]:
        """The arguments of RowStepper.take for the noise of a step of `sample`.

        With noise "philox" the launch draws the noise. Otherwise it is drawn here, as in diffusers.

        Args:
            has_noise: whether the step has noise.
            like: the tensor whose shape, device and dtype diffusers' draw has: in this package's mixins the model's
                output.
            index: the position of the step in its loop, a number that rises along the loop.
        """
        if not has_noise:
            return {}
        rng = self.accelerated.rng_of_step(sample.size(0), index)
        if rng is not None:
            return {"rng": rng}
        z = self._draw(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        return noise_arguments(z.to(sample.dtype), sample)

    def _draw(self, *args: Any, **kwargs: Any) -> Tensor:
        """Calls `randn_tensor` of the module that defines the scheduler's class: a user may have replaced it there."""
        module = vars(sys.modules[library_class(type(self)).__module__])
        original = imported("diffusers.utils.torch_utils", "randn_tensor")
        draw = module.get("randn_tensor", original)
        z: Tensor = draw(*args, **kwargs)
        return z if draw is original else z.clone()  # The step overwrites z, and a user's function may keep its result.

    # ---------------------------------------------------------------------------------------------------------- step

    def _check_step(self, sample: Tensor, model_output: Tensor, *others: Tensor | None, timestep: Any = None) -> None:
        """Raises Fallback if the operators can't take a step of these tensors.

        timestep: passed if the library indexes its tables by the timestep. If the timestep is a tensor with dimensions,
        so are the float32 entries of the tables, which turn results of 16 bits into float32.
        """
        check_tensors(sample, model_output, *others)
        if wants_gradient(sample, model_output, *others):
            raise Fallback("a gradient is asked for")
        if sample.dim() < 2:
            raise Fallback("its samples have no channels")
        if model_output.dtype != sample.dtype:  # check_tensors has checked the dtype of the sample
            if model_output.dtype not in HALVES and model_output.dtype != torch.float32:
                raise Fallback(f"the model's output is {dtype_name(model_output.dtype)}")
            if {model_output.dtype, sample.dtype} == HALVES:
                raise Fallback("its tensors are float16 and bfloat16")
        if isinstance(timestep, Tensor) and timestep.dim() and result_dtype(model_output, sample) in HALVES:
            raise Fallback("its timestep has dimensions, and its samples 16 bits")

    def _take(
        self, rows: FusedRows, row: int, sample: Tensor, model_output: Tensor, noise: dict[str, Any], **extras: Any
    ) -> tuple[Tensor, Tensor]:
        """The next sample and the predicted clean sample, by one launch, or by two with dynamic thresholding."""
        assert rows.rows is not None
        x0 = empty_like(sample)
        prev, _ = rows.rows.take(row, sample, model_output, (), {"x0_out": x0, **noise, **extras})
        if x0.dtype != model_output.dtype and getattr(self.config, "prediction_type", None) == "sample":
            x0 = x0.to(model_output.dtype)  # diffusers returns the model's output itself as the clean sample
        return prev, x0


def _replacement(peers_method: Callable[..., Any], name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """The mixin's method with the signature of the library's method, which pipelines inspect.

    torch.compile breaks its graph at the method: in a graph, the counters that the method updates would be constants.
    """
    fused = method if name in NOT_COUNTED else with_fallback(name)(method)
    # torch.compiler.disable imports the compiler, which is slow, but diffusers has imported it already.
    uncompiled = torch.compiler.disable(fused)

    @functools.wraps(peers_method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (uncompiled if torch.compiler.is_compiling() else fused)(self, *args, **kwargs)

    return call


def make_rows(
    steps: StepTable | None, clip: Clip | None, threshold: DynamicThreshold | None = None, unfused: Sequence[int] = ()
) -> FusedRows:
    """The rows of `steps`. Raises Fallback for a clip that has no fused form.

    Args:
        steps: the table of all timesteps with a fused form, or None if there are none.
        unfused: the timesteps without a fused form.
    """
    row = dict.fromkeys(unfused, UNFUSED)
    if steps is None:
        return FusedRows(None, row)
    if clip is not None and not clip[0] <= clip[1]:
        raise Fallback(f"clip_sample_range is {clip[1]}")
    row |= {t: i for i, t in enumerate(steps.timestep.tolist())}
    return FusedRows(RowStepper(steps, clip, threshold), row)


def clip_of(config: Any) -> tuple[Clip | None, DynamicThreshold | None]:
    """The range to which a config clips predicted clean samples, and its dynamic threshold. Each may be None.

    Raises Fallback for a threshold that has no fused form.
    """
    if getattr(config, "thresholding", False):
        quantile, maximum = config.dynamic_thresholding_ratio, config.sample_max_value
        if not 0 < quantile <= 1 <= maximum:
            raise Fallback(f"dynamic_thresholding_ratio is {quantile}, sample_max_value is {maximum}")
        return (-1.0, 1.0), DynamicThreshold(float(quantile), float(maximum))
    return (-config.clip_sample_range, config.clip_sample_range) if config.clip_sample else None, None


def reads_clip_sample(scheduler: Any) -> bool:
    """Whether the step of a scheduler's class reads the setting `clip_sample`. Some classes have it and ignore it."""
    step = inspect.unwrap(peer_class(type(scheduler)).step)  # type: ignore[attr-defined]
    return "clip_sample" in step.__code__.co_names


def are_tensors(*values: object) -> bool:
    """Whether all values are tensors. Other values are left to diffusers, which may accept or reject them."""
    return all(isinstance(x, Tensor) for x in values)


def tensor_contents(x: Tensor) -> tuple[object, ...]:
    """A cache key of the tensor's values, dtype and shape."""
    if type(x) is Tensor and x.is_cpu and not x.requires_grad and x.dtype is not torch.bfloat16:
        return x.dtype, x.shape, x.numpy().tobytes()  # takes a fifth of the time of the general code below
    return x.dtype, x.shape, x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
