"""The version of torch at run time, and a function that hides a difference between versions."""

import torch

TORCH: tuple[int, int] = tuple(map(int, torch.__version__.split(".")[:2]))  # type: ignore[assignment]


def torch_default_device() -> torch.device:
    """The device of new tensors without a `device` argument.

    torch.get_default_device() of torch 2.7 ignores `with torch.device(...)`.
    """
    return torch.empty(0, device=None).device
