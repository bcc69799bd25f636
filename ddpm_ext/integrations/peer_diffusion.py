"""What the mixins for other libraries' GaussianDiffusion share: rows that follow the object's state, and its noise."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddpm_ext.integrations.fallback import Fallback, kept
from ddpm_ext.integrations.shared import Accelerated
from ddpm_ext.integrations.tensors import DTYPES, TRANSFORMED
from ddpm_ext.ops.extension import C
from ddpm_ext.ops.noise import STREAM_START, Philox, randn

CACHED = 4  # states of an object: replicas on several devices share its cache


class PeerDiffusion(Accelerated):
    """The base of mixins for another library's GaussianDiffusion.

    Its rows stand for the arithmetic of the library's own methods, so an object takes steps by rows only as long as
    nobody has replaced one of these, on the object or in its class.
    """

    _methods: ClassVar[tuple[str, ...]]  # the names of those that the rows stand for

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_peer" in vars(cls):
            cls._methods = (*cls.replaces, *cls.relies_on)

    def _own_methods(self) -> list[Any]:
        """The functions that are called by these names, below the ones of the accelerated class."""
        own, peer = self.__dict__, self._peer
        return [own[name] if name in own else getattr(peer, name, None) for name in self._methods]

    def _check_methods(self) -> None:
        """Raises Fallback where somebody has replaced one of them."""
        for name, method in zip(self._methods, self._own_methods(), strict=True):
            if method is not None and not _is_of(method, {self._known.__module__.partition(".")[0], "torch"}):
                raise Fallback(f"its {name} is not {self.library}'s own")

    def _of_state(self, state: Iterable[Any], make: Callable[[], Any]) -> Any:
        """make(), once for a state. Raises Fallback.

        A state is the same with equal numbers and texts, and with the same other objects and methods, as long as nobody
        has written to a tensor among them.
        """
        held = (*state, *self._own_methods())
        return kept(self, CACHED, tuple(map(_identity, held)), make, held)

    def _training_noise(self, x: Tensor, noise: Tensor | None = None) -> dict[str, Any]:
        """The operators' arguments for the noise of a training batch: the given one, or another draw at each call."""
        rng = self.accelerated.next_forward(x.device) if noise is None else None
        if rng is not None:
            return {"rng": rng}
        return {"noise": torch.randn_like(x) if noise is None else noise}


def _identity(x: Any) -> Hashable:
    """What a state knows of an object: of a tensor also how often somebody wrote to it."""
    if isinstance(x, Tensor):
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise Fallback(TRANSFORMED)
        return id(x), C.written(x)
    return (type(x), x) if isinstance(x, int | float | str) else id(x)


def _is_of(method: Any, packages: set[str]) -> bool:
    """Whether a function, and all that it decorates, are code of these packages."""
    while method is not None:
        if getattr(method, "__globals__", {}).get("__name__", "").partition(".")[0] not in packages:
            return False
        method = getattr(method, "__wrapped__", None)
    return True


def start_noise(shape: Iterable[int], rng: Philox | None, device: torch.device) -> Tensor:
    """What a loop starts from: torch's draw where there is no rng."""
    dtype, sizes = torch.get_default_dtype(), tuple(map(int, shape))
    if rng is None or dtype not in DTYPES:
        return torch.randn(sizes, device=device)
    return randn(sizes, rng, stream=STREAM_START, device=device, dtype=dtype)
