"""Checks of arguments. An error names the argument, its value, and what is expected.

The compiled operators check that the shapes, dtypes and devices of their tensors agree. This module has the checks that
Python makes before it calls an operator, and the checks of the operators in `reference`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Older versions of torch.compile can trace neither isinstance with a union of types nor any(). So this file has tuples
# of types, and loops in place of any().
_INTS = (int, torch.SymInt)
_PAIRS = (tuple, list)
_REALS: Any = (float, int, numbers.Real)  # float and int come first, since a test for the abstract class Real is slow


def as_int(name: str, value: object) -> int:
    """Returns an integer of any type, such as numpy's, as an int. Raises TypeError for a bool and for anything else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r}, expected an int")
    return int(value)


def integer(name: str, value: object, stop: int, stop_name: str, start: int = 0) -> int:
    """Returns `value` as an int. Raises TypeError unless it is an integer, ValueError unless it is in [start, stop).

    stop_name: the text for `stop` in the error, such as "2^32".
    """
    value = as_int(name, value)
    if not start <= value < stop:
        raise ValueError(f"{name} is {value}, expected {start} <= {name} < {stop_name}")
    return value


def flag(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected a bool")


def real(name: str, value: Any) -> float:
    """Returns `value` as a float; plus or minus infinity if it is too large for one. Raises TypeError unless it is a
    number."""
    if isinstance(value, bool) or not isinstance(value, _REALS):
        raise TypeError(f"{name} is {value!r}, expected a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def finite(name: str, value: object) -> float:
    """Returns `value` as a float. Raises TypeError unless it is a number, ValueError unless it is finite."""
    number = real(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value}, expected a finite number")
    return number


def nonnegative(name: str, value: object) -> float:
    """Returns `value` as a float. Raises TypeError unless it is a number, ValueError unless it is finite and at least
    0."""
    number = real(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number, at least 0")
    return number


def clip_range(clip: Any) -> tuple[float, float] | None:
    """Returns `clip`. Raises TypeError unless it is None or has two numbers, ValueError unless low <= high."""
    if clip is None:
        return None
    pair = isinstance(clip, _PAIRS) and len(clip) == 2
    if not (pair and isinstance(clip[0], _REALS) and isinstance(clip[1], _REALS)):
        raise TypeError(f"clip is {clip!r}, expected (low, high) or None")
    if not clip[0] <= clip[1]:
        raise ValueError(f"clip is {clip!r}, expected low <= high")
    return clip


def one_of(name: str, value: Any, choices: Iterable[str]) -> Any:
    """Returns `value`. Raises ValueError unless it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected {' or '.join(repr(choice) for choice in choices)}")
    return value


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic on samples of `dtype` uses: float64 for float64, and float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensor(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor")


def tensors(**values: object) -> None:
    """Raises TypeError for the first value that is neither a tensor nor None."""
    for name, value in values.items():
        if value is not None:
            tensor(name, value)


def floating(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is a tensor of floating-point numbers."""
    tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}, expected a floating one")


def refuse(name: str, values: Any, is_wrong: Any, expected: str) -> None:
    """Raises ValueError, which names the first wrong value, if any value is wrong.

    Args:
        values, is_wrong: arrays, or tensors on the CPU. is_wrong has a bool for each value.
        expected: what the error says is expected.
    """
    if is_wrong.any():
        i = int(np.flatnonzero(is_wrong)[0])
        raise ValueError(f"{name}[{i}] is {values[i]}, expected {expected}")


def floats(name: str, values: Tensor, shape: str) -> Tensor:
    """Returns `values` as float64 (n,) on the CPU.

    Args:
        shape: the expected shape, for the error's text.

    Raises:
        TypeError: `values` is not a floating tensor.
        ValueError: it has more or less than one dimension, or is empty.
    """
    floating(name, values)
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(f"{name} has shape {tuple(values.shape)}, expected {shape}")
    return values.detach().to("cpu", torch.float64)


def plain_layout(name: str, x: Tensor) -> None:
    """Raises ValueError unless a tensor is strided and not nested."""
    if x.layout is not torch.strided:
        raise ValueError(f"{name} has layout {x.layout}, expected torch.strided")
    if x.is_nested:
        raise ValueError(f"{name} is a nested tensor, expected a plain one")


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary one: not of a subclass, nor wrapped by torch.func or by the is_grads_batched of
    torch.autograd.grad."""
    functorch = torch._C._functorch
    wrapped = functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor)
    return type(tensor) is Tensor and not wrapped


def shape(value: object, least: int = 0) -> tuple[int, ...]:
    """Returns the sizes of a shape (batch, ...) as a tuple.

    Raises TypeError unless all are ints, and ValueError for the shape () or a size below `least`.
    """
    if not isinstance(value, Iterable):
        raise TypeError(f"shape is {value}, expected ints (batch, ...)")
    sizes = tuple([int(n) if isinstance(n, np.integer) else n for n in value])
    for n in sizes:
        if isinstance(n, bool) or not isinstance(n, _INTS):
            raise TypeError(f"shape is {sizes}, expected ints (batch, ...)")
        if n < least:
            raise ValueError(f"shape is {sizes}, expected sizes of at least {least}")
    if not sizes:
        raise ValueError("shape is (), expected (batch, ...)")
    return sizes


def split_t(t: int | Tensor) -> tuple[Tensor | None, int]:
    """The operators' arguments `row` and `index` for a timestep or row t: (t, 0) for a tensor, (None, t) for an int.

    Raises TypeError for another type, and ValueError for an int that an int64 can't hold. The operators check the rest.
    """
    if isinstance(t, Tensor):
        return t, 0
    if type(t) is not int:
        if not isinstance(t, int) and isinstance(t, numbers.Integral):  # an integer of numpy
            t = int(t)
        if isinstance(t, bool) or not isinstance(t, _INTS):
            raise TypeError(f"t is a {type(t).__name__}, expected an int64 tensor of shape (batch,) or an int")
    if not -(2**63) <= t < 2**63:
        raise ValueError(f"t is {t}, expected one of the timesteps")
    return None, t


def device(value: object) -> torch.device:
    """Returns `value` as a device. Raises ValueError unless it is one.

    "cuda" without an index becomes the current GPU with its index, since it would not equal the `device` of a tensor,
    which has an index.
    """
    try:
        result = torch.device(value)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {value!r}, expected a torch device such as 'cpu' or 'cuda:0'") from None
    if result.type == "cuda" and result.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return result


def samples(name: str, x: Tensor) -> None:
    """Raises TypeError or ValueError unless x is a floating tensor (batch, ...)."""
    floating(name, x)
    plain_layout(name, x)
    if x.dim() < 1:
        raise ValueError(f"{name} is 0-dimensional, expected (batch, ...)")


def like(name: str, y: Tensor, x_name: str, x: Tensor, *, lower: bool = False) -> None:
    """Raises TypeError or ValueError unless y is a tensor of x's shape, device and dtype.

    Args:
        lower: whether to accept float16 and bfloat16 as well if x is float32.
    """
    if not isinstance(y, Tensor):
        tensor(name, y)
    if y.layout is not torch.strided or y.is_nested:
        plain_layout(name, y)
    if y.shape != x.shape:
        raise ValueError(f"{name} has shape {tuple(y.shape)}, expected that of {x_name}, {tuple(x.shape)}")
    if y.device != x.device:
        raise ValueError(f"{name} is on {y.device}, expected {x_name}'s device, {x.device}")
    narrow = lower and x.dtype == torch.float32 and y.dtype in (torch.float16, torch.bfloat16)
    if y.dtype != x.dtype and not narrow:
        raise TypeError(f"{name} has dtype {y.dtype}, expected that of {x_name}, {x.dtype}")


def per_sample(name: str, v: Tensor, batch: int, device: torch.device, last: int) -> None:
    """Raises TypeError or ValueError unless v is int64 (batch,), on `device`, with values in [0, last].

    Values on a GPU are not checked, because reading them would wait for the GPU. Values in a transform of torch.func
    are not checked, because they cannot be read.
    """
    if v.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {v.dtype}, expected int64")
    if v.shape != (batch,):
        raise ValueError(f"{name} has shape {tuple(v.shape)}, expected ({batch},), one a sample")
    if v.device != device:
        raise ValueError(f"{name} is on {v.device}, expected the samples' device, {device}")
    # Code of torch.compile does not call is_functorch_wrapped_tensor, which torch.compile can't trace.
    readable = v.is_cpu and (torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(v))
    if readable and v.numel() and not (v.min() >= 0 and v.max() <= last):
        refuse(name, v, (v < 0) | (v > last), f"0 <= {name} <= {last}")
