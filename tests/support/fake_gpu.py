"""Helpers of tests with torch's FakeTensorMode: tensors on "cuda" with a dtype and a shape, but without values."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_ext.base.torch_version import TORCH

# Before torch 2.10, fake tensors on "cuda" ask the driver for a stream, which needs a GPU.
needs_fake_gpu = pytest.mark.skipif(TORCH < (2, 10) and not torch.cuda.is_available(), reason="needs torch 2.10")


class Readback(TorchDispatchMode):
    """Raises RuntimeError for an operator that copies values from the GPU to the CPU, which would have to wait.

    With `both_ways`, also for a copy from the CPU to the GPU. A fake tensor itself refuses to return a single value.
    """

    def __init__(self, both_ways=False):
        super().__init__()
        self.both_ways = both_ways

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs)), tree_leaves(result)
        source, target = ({x.device.type for x in tensors if isinstance(x, torch.Tensor)} for tensors in leaves)
        if ("cuda" in source and "cpu" in target) or (self.both_ways and source == {"cpu"} and "cuda" in target):
            raise RuntimeError(f"{function} brings values from {source} to {target}")
        return result
