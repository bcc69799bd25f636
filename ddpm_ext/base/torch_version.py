"""The version of torch at run time."""

import torch

TORCH: tuple[int, int] = tuple(map(int, torch.__version__.split(".")[:2]))  # type: ignore[assignment]
