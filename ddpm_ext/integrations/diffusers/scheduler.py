"""What the schedulers share: rows that follow their settings, the timestep on the host, the noise, the step."""

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
OLDEST = (0, 32)
UNFUSED = -1  # in place of a row
# Of all schedulers: by kinds of loops, and by settings of the mixins with rows of ours.
ROWS: BoundedCache[Any] = BoundedCache(64)
STEPS = ("step", "step_pred")
NOT_COUNTED = ("set_timesteps", "scale_model_input")  # they take note of something, or return what a step has made
HALVES = {torch.float16, torch.bfloat16}


@functools.cache
def imported(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


class FusedRows(NamedTuple):
    """What a scheduler's settings come to.

    Attributes:
        rows: the steps' rows; None where no timestep has a fused form.
        row: the row of each timestep, or UNFUSED.
    """

    rows: RowStepper | None
    row: dict[int, int]


class NextInput(NamedTuple):
    """What scale_model_input returns for the sample that a step has returned: the step writes it as well.

    Attributes:
        sample, version: that tensor, and its version_of.
        model_input: its product with the scheduler's factor. Who gets it may write to it, so it is given once.
    """

    sample: Tensor
    version: tuple[int, ...] | None
    model_input: Tensor

    @classmethod
    def of(cls, sample: Tensor, model_input: Tensor) -> NextInput:
        return cls(sample, version_of(sample), model_input)

    def is_of(self, sample: object) -> bool:
        """Whether that is the very tensor that the step returned, as it was. Inference tensors do not tell."""
        return sample is self.sample and self.version is not None and version_of(self.sample) == self.version


def result_dtype(model_output: Tensor, sample: Tensor) -> torch.dtype:
    """The dtype of diffusers' results."""
    return torch.promote_types(model_output.dtype, sample.dtype)


class Scheduler(Accelerated):
    """The base of the mixins for schedulers."""

    library = "diffusers"
    config: Any
    timesteps: Tensor

    def __init_subclass__(cls) -> None:
        """The mixin's _step takes the place of the peer's step in an accelerated class, and so on; any Fallback that it
        raises is caught there.

        Raises TypeError for an accelerated class of an older diffusers, where DDPM's steps led elsewhere, Euler's
        drew noise that they did not use, and results had other lengths.
        """
        super().__init_subclass__()
        if "_peer" not in vars(cls):
            return
        version = importlib.import_module("diffusers").__version__
        if tuple(map(int, version.split(".")[:2])) < OLDEST:
            raise TypeError(f"diffusers is {version}, expected {'.'.join(map(str, OLDEST))} or newer")
        for name in {*cls.replaces, "set_timesteps"}:
            own = getattr(cls._peer, name, None)
            if own is not None:
                setattr(cls, name, _in_place_of(own, name, getattr(cls, f"_{name}")))

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> Any:
        self.accelerated.begin_loop()
        return peer_method(self, "set_timesteps")(*args, **kwargs)

    # ----------------------------------------------------------------------------------------------------- settings

    def _rows(self, make: Callable[..., Made], *settings: Any) -> Made:
        """make(*settings), from the cache where an object had such settings before. Raises the Fallback that `make`
        raises. The settings of the last call are known again without reading a tensor, which may be on a GPU."""
        return self._cached((make, *settings), make, settings)

    def _cached(self, key: tuple[Any, ...], make: Callable[..., Made], arguments: tuple[Any, ...]) -> Made:
        """make(*arguments), for which `key` stands; see _rows."""
        versions = tuple([(id(x), version_of(x)) if isinstance(x, Tensor) else x for x in key])
        latest = self.__dict__.setdefault("_latest_rows", {})
        known = latest.get(make)
        uncounted = any(isinstance(x, Tensor) and x.is_inference() and x.is_cpu for x in key)  # nobody tells of writes
        if known is None or known[0] != versions or uncounted:
            contents = tuple(tensor_contents(x) if isinstance(x, Tensor) else x for x in key)
            made = ROWS.get_or_make(contents, lambda: made_outside_autograd(make, *arguments))
            # The tensors are held, too, so that no other tensor gets their identity.
            known = latest[make] = versions, key, made
        return result_of(known[2])

    def _row(self, rows: FusedRows, timestep: Any) -> tuple[int, int]:
        """The timestep on the host, and its row. Raises Fallback where it has none.

        An element of self.timesteps is found by its address, and not read: on a GPU, only the first one after
        set_timesteps makes the host wait. A pipeline's loop goes over these.
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
        """A list of the scheduler's timesteps on the host, read once."""
        own = self.timesteps
        if own.is_inference() and own.is_cpu:  # which do not tell whether they were written to
            return own.tolist()
        known = self.__dict__.get("_host_timesteps")
        if known is None or known[0] is not own or known[1] != version_of(own):
            known = self.__dict__["_host_timesteps"] = own, version_of(own), own.tolist()
        return known[2]

    def _index_of(self, timestep: Tensor) -> int | None:
        """The index of the element of self.timesteps that `timestep` is a view of, or None. Neither is read."""
        own: Any = self.timesteps
        return index_of(own, timestep) if isinstance(own, Tensor) else None

    # --------------------------------------------------------------------------------------------------------- noise

    def _noise(self, noisy: bool, like: Tensor, generator: Any, sample: Tensor, index: int) -> dict[str, Any]:
        """The arguments of RowStepper.take for the noise of a step of `sample`.

        Unless it is made in the launch, it is drawn as diffusers draws it: as the model's output, `like`.

        Args:
            index: where the step lies in a loop, a number that rises along it.
        """
        if not noisy:
            return {}
        rng = self.accelerated.rng_of_step(sample.size(0), index)
        if rng is not None:
            return {"rng": rng}
        z = self._draw(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        return noise_arguments(z.to(sample.dtype), sample)

    def _draw(self, *args: Any, **kwargs: Any) -> Tensor:
        """diffusers' randn_tensor, by the name in the module of the scheduler's class, which somebody may have set."""
        module = vars(sys.modules[library_class(type(self)).__module__])
        own = imported("diffusers.utils.torch_utils", "randn_tensor")
        draw = module.get("randn_tensor", own)
        z: Tensor = draw(*args, **kwargs)
        return z if draw is own else z.clone()  # whose function it is may keep what it drew

    # ---------------------------------------------------------------------------------------------------------- step

    def _check_step(self, sample: Tensor, model_output: Tensor, *others: Tensor | None, timestep: Any = None) -> None:
        """Raises Fallback where the operators can't take a step of these tensors.

        timestep: given where the peer indexes its tables by it, so that what it reads there has its dimensions.
        """
        check_tensors(sample, model_output, *others)
        if wants_gradient(sample, model_output, *others):
            raise Fallback("a gradient is asked for")
        if sample.dim() < 2:
            raise Fallback("its samples have no channels")
        if model_output.dtype != sample.dtype:  # check_tensors looked at the sample's
            if model_output.dtype not in HALVES and model_output.dtype != torch.float32:
                raise Fallback(f"the model's output is {dtype_name(model_output.dtype)}")
            if {model_output.dtype, sample.dtype} == HALVES:
                raise Fallback("its tensors are float16 and bfloat16")
        if isinstance(timestep, Tensor) and timestep.dim() and result_dtype(model_output, sample) in HALVES:
            raise Fallback("its timestep has dimensions, and its samples 16 bits")

    def _take(
        self, rows: FusedRows, row: int, sample: Tensor, model_output: Tensor, noise: dict[str, Any], **extras: Any
    ) -> tuple[Tensor, Tensor]:
        """The next sample and the predicted clean one, both in one launch; a threshold takes two."""
        assert rows.rows is not None
        x0 = empty_like(sample)
        prev, _ = rows.rows.take(row, sample, model_output, (), {"x0_out": x0, **noise, **extras})
        if x0.dtype != model_output.dtype and getattr(self.config, "prediction_type", None) == "sample":
            x0 = x0.to(model_output.dtype)  # diffusers returns the model's output itself there
        return prev, x0


def _in_place_of(own: Callable[..., Any], name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """The mixin's method, with the signature of the peer's own one, which pipelines read. A compiler breaks its graph
    there: what is counted would be constants of it."""
    fused = method if name in NOT_COUNTED else with_fallback(name)(method)
    uncompiled = torch.compiler.disable(fused)  # diffusers has imported the compiler

    @functools.wraps(own)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (uncompiled if torch.compiler.is_compiling() else fused)(self, *args, **kwargs)

    return call


def make_rows(
    steps: StepTable | None, clip: Clip | None, threshold: DynamicThreshold | None = None, unfused: Sequence[int] = ()
) -> FusedRows:
    """The rows of `steps`. Raises Fallback for a clip that has no fused form.

    Args:
        steps: None where no timestep has a fused form.
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
    """The range of the predicted clean sample that a config asks for, and the threshold where a sample has its own.
    Raises Fallback for a threshold that has no fused form."""
    if getattr(config, "thresholding", False):
        quantile, maximum = config.dynamic_thresholding_ratio, config.sample_max_value
        if not 0 < quantile <= 1 <= maximum:
            raise Fallback(f"dynamic_thresholding_ratio is {quantile}, sample_max_value is {maximum}")
        return (-1.0, 1.0), DynamicThreshold(float(quantile), float(maximum))
    return (-config.clip_sample_range, config.clip_sample_range) if config.clip_sample else None, None


def reads_clip_sample(scheduler: Any) -> bool:
    """Whether a scheduler's step clips where clip_sample is set: some classes have the setting and never read it."""
    step = inspect.unwrap(peer_class(type(scheduler)).step)  # type: ignore[attr-defined]
    return "clip_sample" in step.__code__.co_names


def are_tensors(*values: object) -> bool:
    """Whether all values are tensors. diffusers rejects what isn't, or takes it in its own way."""
    return all(isinstance(x, Tensor) for x in values)


def tensor_contents(x: Tensor) -> tuple[object, ...]:
    """A key of the tensor's values, dtype and shape."""
    if type(x) is Tensor and x.is_cpu and not x.requires_grad and x.dtype is not torch.bfloat16:
        return x.dtype, x.shape, x.numpy().tobytes()  # in a fifth of the time
    return x.dtype, x.shape, x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
