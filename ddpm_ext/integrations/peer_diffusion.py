"""PeerDiffusion, the base of the mixins for other libraries' GaussianDiffusion.

It has the proofs of overridden steps, the training noise, and a cache with the object's state as key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddpm_ext.integrations.acceleration import Acceleration
from ddpm_ext.integrations.fallback import Fallback, cached_with
from ddpm_ext.integrations.library_code import is_code_of
from ddpm_ext.integrations.proof import TRACE_HINT, Generators, Proof, changed, contents, setting_key, why_left_alone
from ddpm_ext.integrations.shared import CACHED, Accelerated
from ddpm_ext.integrations.tensors import DTYPES, TRANSFORMED
from ddpm_ext.ops.noise import STREAM_START, Philox, randn

Make = Callable[[], Any]
NO_STATE = {*CACHED, "_acceleration", "_is_proving", "_start_noise"}  # attributes that this package adds
# A step's rounding error depends on the size of its largest term. This size is taken to be this factor, times
# sqrt_recip_alphas_cumprod, times the largest number in the step's sample and results (at least 1).
ROUNDED_TERMS = 4.0


class PeerDiffusion(Accelerated):
    """The base of mixins for another library's GaussianDiffusion.

    The rows replace the arithmetic of the library's methods. If one of these methods is overridden, on the object or in
    its class, the rows take no step before they have been proven.
    """

    _methods: ClassVar[tuple[str, ...]]  # the names of the methods that the rows replace

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_peer" in vars(cls):
            cls._methods = (*cls.replaces, *cls.relies_on)

    def _current_methods(self) -> list[Any]:
        """The functions named in `_methods`: attributes of the object, or else methods of its class `_peer`."""
        attributes, peer = self.__dict__, self._peer
        return [attributes[name] if name in attributes else getattr(peer, name, None) for name in self._methods]

    def _foreign_method(self, caller: str = "p_sample") -> str | None:
        """The name of a method that is not the library's code; None if all are.

        Args:
            caller: the library's method that is called. It is not read here, where all of `_methods` are checked.
                Tutorial's override checks only the methods that the caller may call.
        """
        cls, library = self._known, self._known.__module__.partition(".")[0]
        for name, method in zip(self._methods, self._current_methods(), strict=True):
            if method is not None and (method is not getattr(cls, name, None) or not is_code_of(method, library)):
                return name
        return None

    def _check_methods(self) -> None:
        """Raises Fallback if one of `_methods` is not the library's code, for example because a user overrode it.

        It raises nothing inside `_proving`, which runs the rows of an overridden step: to compare them with its code,
        or because they have already agreed with it.
        """
        foreign = self._foreign_method()
        if foreign is not None and "_is_proving" not in self.__dict__:
            raise Fallback(self._refusal(foreign))

    def _refusal(self, foreign: str) -> str:
        reason = f"its {foreign} is not {self.library}'s own code"
        return f"{reason}: single steps are proven" if self.accelerated.trace else f"{reason}; {TRACE_HINT}"

    # ------------------------------------------------------------------------------------------------------- steps

    def _step(
        self, method: str, x: Tensor, timesteps: Make, options: tuple[Any, ...], by_rows: Make, by_code: Make
    ) -> Any:
        """The result of a step: by_rows(), if all methods are the library's code or the rows have been proven.

        Raises Fallback if the library's code must run. In the first loop of an overridden step, this Fallback has an
        `instead`, which returns by_code() and compares it with by_rows(). Both call the model.

        Args:
            timesteps: returns the samples' timesteps. It may wait for a GPU.
            options: the other arguments that the step depends on.
        """
        foreign = self._foreign_method(method)
        if foreign is None:
            return by_rows()
        if not self.accelerated.trace:
            raise Fallback(self._refusal(foreign))
        if "_left_alone" in self.__dict__:
            raise Fallback(self.__dict__["_left_alone"])
        proof: Proof = self._cached_by_state((method, x.shape, x.dtype, x.device, *options), Proof, self._state())
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
        # With the default Acceleration(), the rows draw their noise from torch's generator, as the code does.
        row_tensors = _tensors(self._proving(by_rows, Acceleration()))
        generators.rewind()
        before = contents(vars(self))
        result = by_code()
        code_tensors = _tensors(result)
        stores = changed(before, vars(self))
        if stores:
            proof.failed = f"its {method} stores {', '.join(stores)}"
            stored = self.__dict__.setdefault("_stored", set())
            if repeated := stored.intersection(stores):  # every step stores them, so every step would need a new proof
                proof.failed = self.__dict__["_left_alone"] = why_left_alone(method, repeated)
            stored.update(stores)
        recip = self.sqrt_recip_alphas_cumprod[max(steps)]  # type: ignore[attr-defined]
        size = max(1.0, *(float(tensor.abs().max()) for tensor in (x, *row_tensors)))
        for step in steps:
            proof.compare(step, row_tensors, code_tensors, ROUNDED_TERMS * size * float(recip))
        self.accelerated.record_proof(self.library, method, proof.failed, len(proof.holds) == len(set(steps)))
        return result

    def _proving(self, by_rows: Make, settings: Acceleration) -> Any:
        """The result of by_rows() with these settings. While it runs, `_check_methods` accepts overridden methods."""
        state, previous = self.__dict__, self.accelerated
        state.update(_acceleration=settings, _is_proving=True)
        try:
            return by_rows()
        finally:
            state["_acceleration"] = previous
            del state["_is_proving"]

    # ------------------------------------------------------------------------------------------------------- state

    def _state(self) -> list[Any]:
        """The values of all attributes of the object and of its user classes."""
        state = self.__dict__
        values = [x for name, x in state.items() if name not in NO_STATE]
        values += state.get("_buffers", {}).values()
        for base in self._user_classes():
            values += vars(base).values()
        return values

    def _user_classes(self) -> Sequence[type]:
        """The classes in the object's MRO that a user wrote: those before the library's class."""
        return self._peer.__mro__[: self._peer.__mro__.index(self._known)]

    def _cached_by_state(self, settings: Iterable[Any], make: Make, state: Sequence[Any] | None = None) -> Any:
        """The result of make(), cached by these settings and this state; see setting_key for the keys.

        Raises the Fallback that make() raises, and a Fallback if a value is a tensor and a transform of torch.func is
        active.

        Args:
            state: the values that count as the object's state. Default: its methods.
        """
        values = (*settings, *(self._current_methods() if state is None else state), "_is_proving" in self.__dict__)
        if torch._C._functorch.peek_interpreter_stack() is not None and any(isinstance(x, Tensor) for x in values):
            raise Fallback(TRANSFORMED)
        return cached_with(self, tuple([setting_key(x) for x in values]), make, values)

    # ------------------------------------------------------------------------------------------------------- noise

    def _training_noise(self, x: Tensor, noise: Tensor | None = None) -> dict[str, Any]:
        """The operators' arguments for a training batch's noise: the caller's noise, or else a new draw."""
        rng = self.accelerated.next_forward(x.device) if noise is None else None
        if rng is not None:
            return {"rng": rng}
        return {"noise": torch.randn_like(x) if noise is None else noise}


def _tensors(result: Any) -> list[Tensor]:
    """The tensors in a step's result, which is a tensor, a tuple or a dict."""
    if isinstance(result, Tensor):
        return [result]
    parts = result.values() if isinstance(result, dict) else result
    return [part for part in parts if isinstance(part, Tensor)]


def start_noise(shape: Iterable[int], rng: Philox | None, device: torch.device) -> Tensor:
    """The noise from which a loop starts, drawn by `rng`; by torch if `rng` is None or the default dtype is float64."""
    dtype, sizes = torch.get_default_dtype(), tuple(map(int, shape))
    if rng is None or dtype not in DTYPES:
        return torch.randn(sizes, device=device)
    return randn(sizes, rng, stream=STREAM_START, device=device, dtype=dtype)
