"""Checks whether the fused operators can take the tensors of another library's call, and helpers for tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.integrations.fallback import Fallback
from ddpm_ext.ops.noise import randn

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # the dtypes of samples that the fused operators take
TRANSFORMED = "a transform of torch.func is at work"


def is_plain_tensor(x: Any) -> bool:
    """Whether x is a torch.Tensor, of no subclass and not of a transform of torch.func.

    Under torch.compile only the type is checked: the compiler handles transforms itself.
    """
    return type(x) is Tensor and (torch.compiler.is_compiling() or checks.is_plain(x))


def is_like(y: Any, x: Tensor) -> bool:
    """Whether y is a plain tensor of x's shape, on x's device."""
    return is_plain_tensor(y) and y.shape == x.shape and y.device == x.device


def check_tensors(x: Tensor, *others: Tensor | None, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Raises Fallback if the fused operators can't take x and the others, which must have the shape of x.

    Args:
        dtypes: the dtypes that x may have.
    """
    if not torch.compiler.is_compiling():
        for y in (x, *others):
            if type(y) is Tensor and not checks.is_plain(y):
                raise Fallback(TRANSFORMED)
    if type(x) is not Tensor or not (x.is_cpu or x.is_cuda):
        raise Fallback("its samples are no plain tensors on a CPU or a CUDA device")
    if x.dtype not in dtypes:
        raise Fallback(f"its samples are {dtype_name(x.dtype)}")
    if x.dim() == 0:
        raise Fallback("its samples have no batch dimension")
    for y in others:
        if y is None:
            continue
        if type(y) is not Tensor or y.device != x.device:
            raise Fallback("its tensors are not all plain ones on one device")
        if y.shape != x.shape:
            raise Fallback("its tensors have different shapes")


def check_pair(x: Tensor, other: Tensor | None, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Raises Fallback if the operators can't take x and `other`, which must have the shape and dtype of x."""
    check_tensors(x, other, dtypes=dtypes)
    if other is not None and other.dtype != x.dtype:
        raise Fallback(f"its tensors are {dtype_name(x.dtype)} and {dtype_name(other.dtype)}")


def check_batch(x: Tensor, t: Any, noise: Tensor | None = None, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Raises Fallback if the operators can't take samples x with timesteps t, (batch,) int64, and this noise."""
    check_pair(x, noise, dtypes)
    if not (isinstance(t, Tensor) and t.shape == x.shape[:1] and t.device == x.device):
        raise Fallback("t is not one int64 timestep a sample")
    if t.dtype != torch.int64:
        raise Fallback(f"its timesteps are {dtype_name(t.dtype)}")


def check_output(
    x: Tensor,
    output: Any,
    instead: Callable[[], Any] | None = None,
    *,
    allow_16_bits: bool = True,
    shape: torch.Size | None = None,
) -> None:
    """Raises Fallback, with `instead`, if the operators can't take a model's output for samples x.

    Args:
        instead: see Fallback.
        allow_16_bits: whether the output may have 16 bits if the samples have 32.
        shape: the shape that the output must have. Default: the shape of x.
    """
    if not is_plain_tensor(output):
        raise Fallback("the model's output is no plain tensor", instead)
    dtypes = DTYPES if allow_16_bits and x.dtype == torch.float32 else (x.dtype,)
    has_shape_and_device = output.shape == (x.shape if shape is None else shape) and output.device == x.device
    if not has_shape_and_device or x.dtype not in DTYPES or output.dtype not in dtypes:
        raise Fallback(f"the model's output is {dtype_name(output.dtype)} of shape {tuple(output.shape)}", instead)


def dtype_name(dtype: object) -> str:
    """A dtype's name for messages, such as "float32"."""
    return str(dtype).removeprefix("torch.")


_TORCH_DRAWS = torch.randn, torch.randn_like  # torch's own functions, to notice if they are replaced later


def noise_arguments(noise: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The operators' arguments for noise that was just drawn for a step of samples x.

    The next sample is written over the noise, which saves an allocation. But it gets new memory if x or the noise is
    not contiguous, or if torch.randn or torch.randn_like is patched: the patch may keep the tensors that it returned.
    """
    unpatched = (torch.randn, torch.randn_like) == _TORCH_DRAWS and torch._C._len_torch_function_stack() == 0
    if unpatched and x.is_contiguous() and noise.is_contiguous():
        return {"noise": noise, "out": noise}
    return {"noise": noise}


def layout_arguments(first: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The operators' argument `out`, for a result with the strides that the library's formula would give it.

    These are the strides of the result of torch's arithmetic with `first` as first operand. They matter because
    torch.randn_like of the result draws in the order of its memory. The dict is empty if x has these strides.
    """
    if first.stride() == x.stride():
        return {}
    strides = torch.empty_like(first, device="meta").stride()
    return {} if strides == x.stride() else {"out": x.new_empty_strided(x.shape, strides)}


def noise_itself(source: dict[str, Any], x: Tensor) -> Tensor:
    """The noise in the operators' arguments `source` for samples x, as a tensor. Noise of an `rng` is drawn."""
    if "rng" not in source:
        return source["noise"]
    return randn(x.shape, source["rng"], device=x.device, dtype=x.dtype)


def version_of(x: Tensor) -> tuple[int, ...] | None:
    """A value that changes when the tensor is written to or gets other memory. None for inference tensors.

    Torch does not count the writes to inference tensors.
    """
    return None if x.is_inference() else (x._version, x.data_ptr())


def index_of(vector: Tensor, number: Tensor) -> int | None:
    """The index of the element of a vector that `number` is a view of, or None. No tensor is read."""
    if vector.dim() != 1 or number.numel() != 1 or number.dtype is not vector.dtype or number.device != vector.device:
        return None
    try:
        offset = number.data_ptr() - vector.data_ptr()
    except RuntimeError:  # a tensor has no memory, as within torch.func
        return None
    index, remainder = divmod(offset, max(vector.stride(0), 1) * vector.element_size())
    return index if remainder == 0 and 0 <= index < len(vector) else None


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a gradient is recorded and any of the tensors requires one."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False
