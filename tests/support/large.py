"""Records which operators read or write large tensors."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Large(TorchDispatchMode):
    """Records the operators that read or return a tensor of at least `numel` elements, except views, in their order."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if not function.is_view and any(tensor.numel() >= self.numel for tensor in tensors):
            self.names.append(str(function.overloadpacket))
        return result
