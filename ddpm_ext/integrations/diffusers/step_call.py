"""The arguments of a traced scheduler's step, sorted into tensors and options."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.integrations.diffusers.scheduler import Scheduler, are_tensors, result_dtype
from ddpm_ext.integrations.diffusers.traced_classes import OF_THREE_CHANNELS
from ddpm_ext.integrations.fallback import Fallback
from ddpm_ext.integrations.tensors import dtype_name
from ddpm_ext.tables.trace_run import GIVEN, INPUTS, input_names, parameters_of_step

OTHERS = ("generator", "return_dict")  # arguments of a step on which its row does not depend
EMPTY = inspect.Parameter.empty
# (name, value) of each option, sorted by name. A value is a number, a string, None, a TimestepOffset, or GIVEN for a
# tensor of the samples' shape.
Options = tuple[tuple[str, Any], ...]


class TimestepOffset(NamedTuple):
    """An option whose value is one of the scheduler's timesteps: the one that is `steps` indices after the step's own.

    The value differs from step to step, but the offset is the same in all steps.
    """

    steps: int


class Signature(NamedTuple):
    """The parameters of a scheduler class's step.

    Attributes:
        inputs: the names of the parameters for the model's output, the timestep and the sample.
        are_known: whether tracing can call the step with these names.
        defaults: {name: default} of all parameters. EMPTY means that there is no default, or that rows do not depend on
            the argument.
    """

    inputs: tuple[str, ...]
    are_known: bool
    defaults: dict[str, Any]

    @classmethod
    def of(cls, scheduler: type) -> Signature:
        defaults = {name: parameter.default for name, parameter in parameters_of_step(scheduler).items()}
        inputs = input_names([*defaults])
        are_known = all(name in names for name, names in zip(inputs, INPUTS, strict=False))
        # If return_dict is False by default, a step's output object may have results that its tuple lacks. In this case
        # return_dict stays an option, on which rows depend.
        independent_names = [name for name in (*inputs, *OTHERS) if defaults.get(name, False) is not False]
        return cls(inputs, are_known, defaults | dict.fromkeys(independent_names, EMPTY))


class Call(NamedTuple):
    """The arguments of a step.

    Attributes:
        m, timestep, x: the model's output, the timestep without a dimension, and the sample.
        has_dim: whether the caller's timestep had a dimension.
        options: the arguments other than these, generator and return_dict, without those whose value is the default.
        tensors: the values of the options that are GIVEN, in their order.
        other_arguments: generator and return_dict, if the caller has passed them.
    """

    m: Tensor
    timestep: Any
    x: Tensor
    has_dim: bool
    options: Options
    tensors: list[Tensor]
    other_arguments: dict[str, Any]


def call_of(scheduler: Scheduler, signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Sorts a step's arguments. Raises Fallback if no row can take them."""
    if not signature.are_known:
        raise Fallback("its step has other arguments than model_output, timestep and sample")
    defaults = signature.defaults
    values: dict[str, Any] = {**dict(zip(defaults, args, strict=False)), **kwargs}
    if len(args) > len(defaults) or not {*signature.inputs} <= values.keys() <= defaults.keys():
        raise Fallback  # diffusers rejects them
    m, timestep, x = [values.pop(name) for name in signature.inputs]
    if not are_tensors(x, m) or not isinstance(timestep, Tensor | numbers.Number):
        raise Fallback
    if "noise_sampler" in vars(scheduler):  # fusing would not pay: the noise takes a hundred times as long as a step
        raise Fallback("its noise is that of a Brownian path")
    if type(scheduler).__name__ in OF_THREE_CHANNELS and m.shape[1:2] > (3,):
        config = scheduler.config
        if config.variance_type in ("learned", "learned_range") and config.prediction_type == "epsilon":
            m = m[:, :3]
    scheduler._check_step(x, m)  # noqa: SLF001 (of this package)
    other_arguments = {name: values.pop(name) for name in OTHERS if name in values and defaults[name] is EMPTY}
    options: list[tuple[str, Any]] = []
    tensors: list[Tensor] = []
    for name, value in sorted(values.items()):
        if defaults[name] is EMPTY or value is not defaults[name]:
            option = _option(scheduler, name, value, x, m, timestep)
            tensors += [value] if option is GIVEN else []
            options.append((name, option))
    has_dim = isinstance(timestep, Tensor) and timestep.dim() > 0
    if isinstance(timestep, Tensor) and has_dim:
        if timestep.dim() > 1 or len(timestep) not in (1, len(x)):
            raise Fallback("its timestep is not one number")
        if timestep.stride(0) and len(timestep) > 1 and not bool((timestep == timestep[0]).all()):
            raise Fallback("its samples have different timesteps")
        timestep = timestep[0]
    return Call(m, timestep, x, has_dim, tuple(options), tensors, other_arguments)


# ------------------------------------------------------------------------------------------------------------ options


def _option(scheduler: Scheduler, name: str, value: Any, x: Tensor, m: Tensor, timestep: Any) -> Any:
    """What stands in Options for the value of an argument. Raises Fallback for a value that no row can take.

    If the value and the step's timestep are views of elements of the scheduler's timesteps, the value becomes a
    TimestepOffset, so that the option has the same value in each step.
    """
    if isinstance(value, Tensor) and value.dim():
        if value.shape != x.shape:
            raise Fallback(f"it is called with {name} of shape {tuple(value.shape)}")
        scheduler._check_step(x, m, value)  # noqa: SLF001 (of this package)
        if torch.promote_types(value.dtype, result_dtype(m, x)) not in (x.dtype, result_dtype(m, x)):
            raise Fallback(f"{name} is {dtype_name(value.dtype)}")
        return GIVEN
    if isinstance(value, Tensor):
        value_index, index = (scheduler._index_of(t) if isinstance(t, Tensor) else None for t in (value, timestep))  # noqa: SLF001
        if value_index is None:
            return value.item()
        return scheduler._times()[value_index] if index is None else TimestepOffset(value_index - index)  # noqa: SLF001 (of this package)
    if value is not None and not isinstance(value, numbers.Number | str):
        raise Fallback(f"it is called with {name}")
    return value


def options_of_steps(options: Options, timesteps: Tensor, first: int, count: int) -> Mapping[str, Any]:
    """The options of the `count` steps from index `first` on, in the form that tracing takes.

    A TimestepOffset becomes a list of timesteps, one for each step, with None if the offset leads beyond the loop's
    ends.

    Args:
        timesteps: the scheduler's timesteps.
    """
    step_options = dict(options)
    for name, value in options:
        if isinstance(value, TimestepOffset):
            indices = range(first + value.steps, first + value.steps + count)
            step_options[name] = [timesteps[i].item() if 0 <= i < len(timesteps) else None for i in indices]
    return step_options


def options_at(options: Options, index: int, count: int) -> Options:
    """The options of the step at `index` of a loop of `count` steps.

    A TimestepOffset that leads beyond the loop's ends is left out.
    """
    return tuple([(n, x) for n, x in options if not isinstance(x, TimestepOffset) or 0 <= index + x.steps < count])
