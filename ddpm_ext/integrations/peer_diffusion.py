"""What the mixins for other libraries' GaussianDiffusion share: rows that follow the object's state, and its noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddpm_ext.integrations.acceleration import Acceleration
from ddpm_ext.integrations.fallback import Fallback, cached_with
from ddpm_ext.integrations.library_code import is_code_of
from ddpm_ext.integrations.proof import HOW, Generators, Proof, changed, contents, setting_of, why_left_alone
from ddpm_ext.integrations.shared import CACHED, Accelerated
from ddpm_ext.integrations.tensors import DTYPES, TRANSFORMED
from ddpm_ext.ops.noise import STREAM_START, Philox, randn

Make = Callable[[], Any]
NO_STATE = {*CACHED, "_acceleration", "_is_proving", "_start_noise"}  # attributes that no library's object has
ROUNDED_TERMS = 4.0  # how many times as large as a result the terms may be that a step adds up, at no noise


class PeerDiffusion(Accelerated):
    """The base of mixins for another library's GaussianDiffusion.

    Its rows stand for the arithmetic of the library's own methods, so an object takes steps by rows only as long as
    nobody has replaced one of these, on the object or in its class; or once they have been proven.
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

    def _foreign_method(self, of: str = "p_sample") -> str | None:
        """The name of a method that is not the library's own; None where all are. of: the method that would call it."""
        known, library = self._known, self._known.__module__.partition(".")[0]
        for name, method in zip(self._methods, self._own_methods(), strict=True):
            if method is not None and (method is not getattr(known, name, None) or not is_code_of(method, library)):
                return name
        return None

    def _check_methods(self) -> None:
        """Raises Fallback where somebody has replaced one of them, unless a step is proven."""
        foreign = self._foreign_method()
        if foreign is not None and "_is_proving" not in self.__dict__:
            raise Fallback(self._refusal(foreign))

    def _refusal(self, foreign: str) -> str:
        own = f"its {foreign} is not {self.library}'s own code"
        return f"{own}: single steps are proven" if self.accelerated.trace else f"{own}; {HOW}"

    # ------------------------------------------------------------------------------------------------------- steps

    def _step(
        self, method: str, x: Tensor, timesteps: Make, options: tuple[Any, ...], by_rows: Make, by_code: Make
    ) -> Any:
        """A step's result: by_rows(), where all methods are the library's own, or it has been proven.

        In the first loop of a step of somebody's own, by_code() makes the result, and is compared with by_rows(): both
        call the model. Raises Fallback.

        Args:
            timesteps: tells those of the samples, for which it may wait for a GPU.
            options: what else the step depends on.
        """
        foreign = self._foreign_method(method)
        if foreign is None:
            return by_rows()
        if not self.accelerated.trace:
            raise Fallback(self._refusal(foreign))
        if "_left_alone" in self.__dict__:
            raise Fallback(self.__dict__["_left_alone"])
        proof: Proof = self._of_state((method, x.shape, x.dtype, x.device, *options), Proof, self._state())
        if proof.failed is not None:
            raise Fallback(proof.failed)
        steps = timesteps()
        if proof.holds.issuperset(steps):
            return self._proving(by_rows, self.accelerated)
        raise Fallback(instead=lambda: self._compared(proof, method, x, steps, by_rows, by_code))

    def _compared(
        self, proof: Proof, method: str, x: Tensor, steps: Sequence[int], by_rows: Make, by_code: Make
    ) -> Any:
        generators = Generators(x.device)
        ours = _tensors(self._proving(by_rows, Acceleration()))  # which draws as the code does
        generators.rewind()
        before = contents(vars(self))
        result = by_code()
        theirs = _tensors(result)
        stores = changed(before, vars(self))
        if stores:
            proof.failed = f"its {method} stores {', '.join(stores)}"
            stored = self.__dict__.setdefault("_stored", set())
            if again := stored.intersection(stores):  # the state of each later step would be another one
                proof.failed = self.__dict__["_left_alone"] = why_left_alone(method, again)
            stored.update(stores)
        recip = self.sqrt_recip_alphas_cumprod[max(steps)]  # type: ignore[attr-defined]
        size = max(1.0, *(float(each.abs().max()) for each in (x, *ours)))
        for step in steps:
            proof.compare(step, ours, theirs, ROUNDED_TERMS * size * float(recip))
        self.accelerated.record_proof(self.library, method, proof.failed, len(proof.holds) == len(set(steps)))
        return result

    def _proving(self, by_rows: Make, settings: Acceleration) -> Any:
        """by_rows() with these settings, though a method is not the library's own."""
        state, own = self.__dict__, self.accelerated
        state.update(_acceleration=settings, _is_proving=True)
        try:
            return by_rows()
        finally:
            state["_acceleration"] = own
            del state["_is_proving"]

    # ------------------------------------------------------------------------------------------------------- state

    def _state(self) -> list[Any]:
        """The values of all attributes, of the object and of the classes that are not the library's."""
        state = self.__dict__
        values = [x for name, x in state.items() if name not in NO_STATE]
        values += state.get("_buffers", {}).values()
        for base in self._own_classes():
            values += vars(base).values()
        return values

    def _own_classes(self) -> Sequence[type]:
        """Those of the object that are not the library's."""
        return self._peer.__mro__[: self._peer.__mro__.index(self._known)]

    def _of_state(self, settings: Iterable[Any], make: Make, state: Sequence[Any] | None = None) -> Any:
        """make(), once for these settings and this state. Raises Fallback.

        Both are the same with equal numbers and texts, and with the same other objects, as long as nobody has written
        to a tensor among them. state: None: that of the methods.
        """
        values = (*settings, *(self._own_methods() if state is None else state), "_is_proving" in self.__dict__)
        if torch._C._functorch.peek_interpreter_stack() is not None and any(isinstance(x, Tensor) for x in values):
            raise Fallback(TRANSFORMED)
        return cached_with(self, tuple([setting_of(x) for x in values]), make, values)

    # ------------------------------------------------------------------------------------------------------- noise

    def _training_noise(self, x: Tensor, noise: Tensor | None = None) -> dict[str, Any]:
        """The operators' arguments for the noise of a training batch: the given one, or another draw at each call."""
        rng = self.accelerated.next_forward(x.device) if noise is None else None
        if rng is not None:
            return {"rng": rng}
        return {"noise": torch.randn_like(x) if noise is None else noise}


def _tensors(result: Any) -> list[Tensor]:
    """Those that a step returns, alone, in a tuple or in a dict."""
    if isinstance(result, Tensor):
        return [result]
    parts = result.values() if isinstance(result, dict) else result
    return [part for part in parts if isinstance(part, Tensor)]


def start_noise(shape: Iterable[int], rng: Philox | None, device: torch.device) -> Tensor:
    """What a loop starts from: torch's draw where there is no rng."""
    dtype, sizes = torch.get_default_dtype(), tuple(map(int, shape))
    if rng is None or dtype not in DTYPES:
        return torch.randn(sizes, device=device)
    return randn(sizes, rng, stream=STREAM_START, device=device, dtype=dtype)
