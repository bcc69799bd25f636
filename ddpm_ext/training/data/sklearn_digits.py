"""scikit-learn's handwritten digits."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_ext.base.optional import require

__all__ = ["digits"]

_PARTS = ("train", "heldout", "all")
# Each seventh image is held out. The digits repeat in cycles of ten, which has no factor in common with seven, so each
# digit is about equally frequent in both parts.
_HELD_OUT_EVERY = 7


def digits(part: str = "all") -> tuple[Tensor, Tensor]:
    """Loads scikit-learn's handwritten digits (`load_digits`): 1,797 grey images of 8 by 8 pixels, in their order.

    Args:
        part: "train" (1,541 images), "heldout" (256, every seventh) or "all".

    Returns:
        Images (count, 1, 8, 8) float32 in [-1, 1], and labels (count,) int64 from 0 to 9.

    Raises:
        ValueError: an unknown part. MissingExtra: scikit-learn is not installed.
    """
    if part not in _PARTS:
        raise ValueError(f"part: got {part!r}, expected one of {', '.join(_PARTS)}")
    loaded = require("sklearn.datasets", "the digits data set").load_digits()
    images = torch.from_numpy(loaded.images).float().div_(8).sub_(1).unsqueeze(1)  # pixels are 0 to 16
    labels = torch.from_numpy(loaded.target).long()
    held_out = torch.arange(len(labels), device="cpu") % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    chosen = {"train": ~held_out, "heldout": held_out, "all": torch.ones_like(held_out)}[part]
    return images[chosen], labels[chosen]
