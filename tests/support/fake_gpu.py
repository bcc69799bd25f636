"""A GPU whose tensors have a device, a dtype and a shape, but no values: torch's FakeTensorMode, where no GPU is."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_ext.base.torch_version import TORCH

# Before torch 2.10, a fake GPU's tensors ask the driver for a real one's stream.
needs_fake_gpu = pytest.mark.skipif(TORCH < (2, 10) and not torch.cuda.is_available(), reason="needs torch 2.10")


class Readback(TorchDispatchMode):
    """Raises where values come from a device, for which a step would have to wait; with `both_ways` also where they go
    there. A fake tensor itself refuses to read a single value."""

    def __init__(self, both_ways=False):
        super().__init__()
        self.both_ways = both_ways

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs)), tree_leaves(found)
        given, made = ({x.device.type for x in some if isinstance(x, torch.Tensor)} for some in leaves)
        if ("cuda" in given and "cpu" in made) or (self.both_ways and given == {"cpu"} and "cuda" in made):
            raise RuntimeError(f"{function} brings values from {given} to {made}")
        return found
