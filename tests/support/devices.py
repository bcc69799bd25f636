"""Moves a test's inputs from the CPU to the test's device."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from ddpm_ext import Inpaint, Interpolation, Philox


def moved(value: Any, device: torch.device) -> Any:
    """A copy of the value with its tensors on `device`.

    The value may be a tensor, a Philox, an Inpaint, an Interpolation, or a dict, list or tuple of these. Of a Philox,
    only the sample ids move, not a seed or a draw in a tensor. Other values are returned unchanged, and so are tensors
    on the device meta, which tests use as a wrong device.
    """
    if isinstance(value, torch.Tensor):
        return value if value.is_meta else value.to(device)
    if isinstance(value, Philox) and value.sample_ids is not None:
        seed = value.seed_value % 2**64 if value.seed is None else value.seed
        return Philox(seed, moved(value.sample_ids, device), draw=value.draw, stream=value.stream)
    if isinstance(value, Inpaint | Interpolation):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    if isinstance(value, dict):
        return {key: moved(v, device) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(v, device) for v in value)
    return value
