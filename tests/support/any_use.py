"""Property tests that make the same random calls of an accelerated object and of a plain object of a library.

After each call, the test checks that both returned the same results and that their generators have the same states.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import torch
from support.choices import Choose
from torch import Tensor

COPIES: dict[str, Callable[[Any], Any]] = {
    "the same": lambda x: x,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}


class Subject:
    """One of the two objects, with the generators that its calls use.

    Each method `do_...` makes a call of the object. It takes a Choose, and returns tensors, numbers or None. The
    methods of the second subject take a Replay, which repeats the choices of the first subject.
    """

    refusals: tuple[type[Exception], ...] = ()  # errors that a call may raise, if it raises them for both subjects

    def __init__(self, diffusion: Any) -> None:
        self.diffusion = diffusion
        self.generator = torch.Generator().manual_seed(0)
        self.global_states = torch.Generator().manual_seed(1).get_state(), random.Random(1).getstate()

    def state(self) -> list[Any]:
        """The states that must be the same for both objects after each call."""
        return [self.generator.get_state(), *self.global_states]

    def normal(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def do_copy(self, choose: Choose) -> None:
        self.diffusion = COPIES[choose.one_of([*COPIES], "how")](self.diffusion)

    def call(self, name: str, choose: Choose) -> list[Any] | None:
        """Makes the call `name`. Returns its results and the state after it, or None if it raises one of `refusals`."""
        before = random.getstate()
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.global_states[0])
            random.setstate(self.global_states[1])
            try:
                result = getattr(self, name)(choose)
            except self.refusals:
                return None
            finally:
                self.global_states = torch.get_rng_state(), random.getstate()
                random.setstate(before)
        return [*(result if isinstance(result, list | tuple) else [result]), *self.state()]


class Recorded:
    """A Choose that also records the choices, in the list `choices`."""

    def __init__(self, choose: Choose) -> None:
        self.choose, self.choices = choose, []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def choice(*arguments: Any, **options: Any) -> Any:
            self.choices.append(getattr(self.choose, name)(*arguments, **options))
            return self.choices[-1]

        return choice


class Replay:
    """A Choose that returns the choices of a list, in their order."""

    def __init__(self, choices: list[Any]) -> None:
        self.choices = iter(choices)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments, **options: next(self.choices)


def same(ours: Any, theirs: Any, bound: float, what: str) -> None:
    """Checks that two results of a call are the same, or within the bound of same_calls if they are float tensors."""
    assert type(ours) is type(theirs), what
    if not isinstance(theirs, Tensor):
        assert ours == theirs, what
    elif not theirs.is_floating_point():
        assert torch.equal(ours, theirs), what
    else:
        kinds = [(x.dtype, x.shape, x.is_inference()) for x in (ours, theirs)]
        assert kinds[0] == kinds[1], what
        size = max(1.0, theirs.abs().nan_to_num(posinf=0.0).max().item())
        options = {"rtol": 0, "atol": bound * size, "equal_nan": True}
        torch.testing.assert_close(ours, theirs, msg=lambda text: f"{what}: {text}", **options)


def same_calls(choose: Choose, ours: Subject, theirs: Subject, calls: int, bound: float) -> None:
    """Makes at most `calls` random calls of both objects, and checks after each call that the results are the same.

    bound: the largest difference of float results, relative to their largest number, or to 1 if that is larger.
    """
    names, history = [name for name in dir(theirs) if name.startswith("do_")], []
    for _ in range(choose.integer(calls // 2, calls, "calls")):
        name = choose.one_of(names, "call")
        recorded = Recorded(choose)
        expected = theirs.call(name, recorded)
        history.append(f"{name[3:]}{tuple(recorded.choices)}")
        found = ours.call(name, Replay(recorded.choices))
        if expected is None or found is None:
            assert expected is found, ", ".join(history)
            return  # after an error, the library's object may be in any state
        assert len(found) == len(expected)
        for mine, other in zip(found, expected, strict=True):
            same(mine, other, bound, ", ".join(history))
