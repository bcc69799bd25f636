"""The version of torch at run time, and what is not the same in all of them."""

import torch

TORCH: tuple[int, int] = tuple(map(int, torch.__version__.split(".")[:2]))  # type: ignore[assignment]


def torch_default_device() -> torch.device:
    """Where torch makes a tensor that no device is given for. torch.get_default_device() of torch 2.7 does not know of
    `with torch.device(...)`."""
    return torch.empty(0, device=None).device
